"""The `fpga` backend: generated circuits, simulated or on a card."""
