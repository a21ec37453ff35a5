"""Drop-ins with the names, arguments and values of other libraries, none of which they import."""
