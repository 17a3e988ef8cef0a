"""What calibration data says of a model: batches, hidden states, gradients, weights along training."""
