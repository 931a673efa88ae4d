"""The protocol that huggingface_hub speaks, over the storage. Facts: the client's source, huggingface_hub 2.4."""
