"""hubforge: from a recipe to a published, evaluated, documented, verifiable model on the Hugging Face Hub."""

__version__ = "0.1.0"
