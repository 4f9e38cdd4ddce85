"""Networks applied to images: batches, devices, a form for inference, export, explanations."""
