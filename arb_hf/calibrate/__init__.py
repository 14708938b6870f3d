"""Running the model: calibration data, decoder layers, and the loop that binarizes one after the other."""
