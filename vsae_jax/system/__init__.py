"""The machine: errors, signals, progress, locks, processes, devices, whole-or-nothing
files. Knows no autoencoder."""
