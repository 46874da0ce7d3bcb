"""What do other programs write and read? Folders, vocabularies, templates, packed weights, GGUF."""
