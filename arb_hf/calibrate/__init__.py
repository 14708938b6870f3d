"""A run: text through the model, and one decoder layer after the other made binary.

The way of a weight, from whole to part::

    model.binarize_model             everything that can refuse a run; the first layer's inputs; then layer after layer
        layer.binarize_layer         one decoder layer: to the device, binarized or restored, its outputs passed on
            matrices.binarize_matrices    its matrices, in as many waves as their Hessians need, shared among processes
                hessians.accumulate       the second moments of their inputs
                binarize.matrix           one matrix (:mod:`arb_hf.binarize`)
            tune.tune_layer          its codes, scales and norms, by gradient

Beside it: ``batches`` (calibration text as tokens), ``capture`` (what a decoder layer is called with), ``decoder`` (which
layers and matrices a model has), ``tables`` (embedding and head), ``plan`` (what a run takes), ``state`` (what goes from layer to layer), ``spool``
(activations on disk), ``offload`` (weights on disk), ``processes`` (several at once), ``resume`` (after a crash).
"""
