"""A page in the browser over the commands; nothing is computed here that they do not compute."""
