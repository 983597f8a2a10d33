"""hasten: train language models faster, and measure what each technique is worth."""
