"""Commands of ``optiq lora``, one module each."""
