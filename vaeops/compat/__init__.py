"""Drop-ins with the names, arguments and values of other libraries. None of them imports the library it stands in for."""
