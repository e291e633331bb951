"""Floor 2: the quantiser, exact integer products, numbers mod p, and keys expanded to pads.

Both sides must compute these alike, to the bit. The functions keep none of their arguments, some of which are secret on
the trusted side (keys, pads). The package keeps compiled loops, its threads and the result of a self-test.
"""
