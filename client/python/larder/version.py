"""The version of this package: that of the library it is made for."""
VERSION = "0.1.0"
