"""Drills: an alert's whole way on a staging plane, from the fault to the message that it is over."""
