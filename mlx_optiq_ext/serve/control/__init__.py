"""What operators ask for: health, metrics, the dashboard's status, log and switches."""
