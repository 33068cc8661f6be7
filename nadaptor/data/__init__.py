"""Images: data sets by name, their order, their batches and augmentation."""
