"""``refinement="paper"``: the published algorithms, exact.

Who calls whom, for one matrix::

    driver.binarize_published        column blocks left to right, each one's error carried on to the blocks after it
        partition                    which columns are salient, which weights are large; judged on saliencies
            search                   the errors of all candidates
        billm, arb, arb_x, arb_rc    the scales and signs of one group of weights: a published method each
            fit                      what a group is fitted to, and the steps that methods share

``compiled`` holds the C twins of ``search``, ``arb`` and ``arb_rc``; without the C library, or off the CPU, torch does the
work, with the same results.
"""
