"""What a fetch should do, as data: no I/O, no clock, no event loop."""
