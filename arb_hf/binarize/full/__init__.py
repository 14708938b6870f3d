"""``refinement="full"``: better than published at the same bits, by what each choice does to the layer's outputs.

Who calls whom, for one matrix::

    driver.binarize_full    salient columns; blocks left to right; then sweeps of block coordinate descent
        steps               one block: start, nearest codes, rounding with feedback, scales by least squares, descent
            rounding        columns take their levels one after the other, each step moving the targets of later ones
            coded           a block as codes, and the scales that give them values

``latent`` is a binary weight in training, for :mod:`arb_hf.calibrate.tune`. ``compiled`` holds the C twin of ``rounding``;
without the C library, or off the CPU, torch does the work, with the same results.
"""
