"""Synthetic evidence of each kind, under roots of the tests: what real processors would give, with any fault on demand.

``intel``: quotes of TDX and SGX with their collateral. ``amd``: reports of SEV-SNP with their certificates.
``layout``: where the fields of each structure are. Nothing here verifies; tests/tee/test_forge.py checks that what is
forged has the form of real evidence.
"""
