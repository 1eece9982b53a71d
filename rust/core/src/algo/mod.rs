//! Algorithms that know nothing of codes or files.

pub mod assign;
pub mod kmeans;
pub mod linear;
pub mod nearest;
mod progressive;
mod seeding;
pub mod trellis;
