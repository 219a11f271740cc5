"""The fine-tune screen: write a data set, plan a training, watch it, mount what comes out."""
