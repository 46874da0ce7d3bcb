"""What do other programs write and read? Model folders, vocabularies, templates, packed layouts, GGUF."""
