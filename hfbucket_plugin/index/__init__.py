"""The key index: its format, its objects, and the reader that an engine keeps."""
