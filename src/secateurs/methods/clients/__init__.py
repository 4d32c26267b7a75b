"""Methods that train one model across clients who keep their data."""
