"""Operations with an implementation for each platform: the one place of `ops` that asks what a program is compiled for."""
