"""The conversion as a whole: measure, allocate, rewrite, verify, score, describe."""
