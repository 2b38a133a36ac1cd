"""The mathematics: arrays in, arrays out, no files."""
