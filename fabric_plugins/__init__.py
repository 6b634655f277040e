"""The built-in plugins: each is found by its entry point, as a third party's is."""
