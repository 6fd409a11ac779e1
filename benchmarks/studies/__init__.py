"""One study a file: which runs answer its question, its tables and its figures."""
