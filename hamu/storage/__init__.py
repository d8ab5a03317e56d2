"""Files that are whole when they are there, broken ones that are found, folders that one process owns, stores behind a URL."""
