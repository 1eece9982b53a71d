//! Algorithms that know nothing of codes or files.

pub mod assign;
pub mod kmeans;
pub mod levels;
pub mod linear;
pub mod lloyd_max;
pub mod nearest;
mod progressive;
mod seeding;
pub mod trellis;
