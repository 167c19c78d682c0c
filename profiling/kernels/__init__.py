"""The fused ops measured: what they compile to, the bytes they move, their least time, and their time on a card."""
