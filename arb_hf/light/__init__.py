"""What must answer at once: the command line's parser and the reading of file headers. Standard library only.

Nothing here imports the rest of the package before a command needs it, so that ``arb-hf --help`` and ``arb-hf inspect``
do not wait for torch.
"""
