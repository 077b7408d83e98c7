"""How it works. Nothing here is public: it may change at any time."""
