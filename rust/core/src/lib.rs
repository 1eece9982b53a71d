//! The core of vqrs: embedding tables made small and fast. Pure Rust, no Python.
//!
//! Many ways to learn, few ways to read. A [`quantizer`] learns a [`decoder`] and codes; a [`table`] is a decoder with
//! its codes, in memory or in a mapped file; lookups and [`search`] need nothing else.
//!
//! | layer | modules | may use |
//! |---|---|---|
//! | 0 ground | [`error`], [`matrix`], [`tensor`], [`bits`], [`rng`], [`pool`] | nothing above |
//! | 1 numeric kernels | [`kernels`] | ground |
//! | 2 algorithms without codes | [`algo`] | kernels |
//! | 3 reading | [`decoder`] | kernels, algo |
//! | 4 learning; keeping | [`quantizer`] (knows no files); [`table`] (knows no learning) | algo and decoder; decoder |
//! | 5 using | [`search`], [`stream`] | table; table and quantizer |

pub mod algo;
pub mod bits;
pub mod decoder;
pub mod error;
pub mod kernels;
pub mod matrix;
pub mod pool;
pub mod quantizer;
pub mod rng;
pub mod search;
pub mod stream;
pub mod table;
pub mod tensor;

pub use error::{Error, Result};

/// Version of this library.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
