"""prefkern inside other people's trainers. Each module needs its library, and says so on import."""
