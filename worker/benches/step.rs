//! One whole step of one worker in memory.

fn main() {}
