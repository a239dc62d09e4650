"""Bytes in → signal out: book, features, triggers, backends, publisher, client."""
