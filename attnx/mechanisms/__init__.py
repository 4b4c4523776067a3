"""One file per mechanism, filed by what decoding must keep; see INDEX.md and CONTRIBUTING.md."""
