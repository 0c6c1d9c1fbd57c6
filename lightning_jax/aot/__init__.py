"""What a TPU compiler says about a run on chips that are not here: memory, traffic, a roofline."""
