"""The command line: ``parser`` reads the arguments and answers at once, ``commands`` does the work.

Nothing is imported here, and ``parser`` imports the standard library and :mod:`arb_hf.format.headers` only, so that
``arb-hf --help`` and ``arb-hf inspect`` do not wait for torch.
"""
