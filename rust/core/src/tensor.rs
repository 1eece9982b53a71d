//! Named arrays whose bytes are owned or borrowed from a mapped file: what decoders are made of.

use crate::error::{reserved, zeros, Error, Result};
#[cfg(target_os = "linux")]
use memmap2::Advice;
use memmap2::MmapMut;
use std::ops::Range;
use std::sync::Arc;

/// Where bytes live: memory of our own or a mapped file.
pub trait Bytes: Send + Sync {
    /// All bytes.
    fn bytes(&self) -> &[u8];

    /// To be called before bytes are read that may be those of a mapped file: makes sure that it may be cut meanwhile.
    fn watch(&self) {}

    /// True once a mapped file was found cut: zeros were read in place of what is missing.
    fn damaged(&self) -> bool {
        false
    }
}

/// 64 bytes on a cache line of their own: the unit of owned buffers, so that SIMD loads never straddle a line.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

struct Owned {
    lines: Vec<Line>,
    len: usize,
}

impl Bytes for Owned {
    fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl Bytes for MmapMut {
    fn bytes(&self) -> &[u8] {
        self
    }
}

/// What errors call new tensors.
const NEW: &str = "a tensor";

/// Bytes from which a buffer has pages of its own, large ones where the system has them: rows that are read at random
/// would else wait for the address of their page as long as for their codes.
const PAGES: usize = 4 << 20;

fn large_pages(bytes: &[u8]) -> Option<MmapMut> {
    let mut pages = (bytes.len() >= PAGES).then(|| MmapMut::map_anon(bytes.len()).ok()).flatten()?;
    // Refused where the system is built without them, and then they are ordinary pages.
    #[cfg(target_os = "linux")]
    let _ = pages.advise(Advice::HugePage);
    pages.copy_from_slice(bytes);
    Some(pages)
}

/// A range of shared bytes. Cloning shares.
#[derive(Clone)]
pub struct Buffer {
    source: Arc<dyn Bytes>,
    range: Range<usize>,
}

impl Buffer {
    /// A copy of `bytes`, aligned to 64 bytes.
    pub fn copy_of(bytes: &[u8]) -> Result<Self> {
        if let Some(pages) = large_pages(bytes) {
            return Ok(Buffer { source: Arc::new(pages), range: 0..bytes.len() });
        }
        let mut lines: Vec<Line> = zeros(NEW, Some(bytes.len().div_ceil(64)))?;
        bytemuck::cast_slice_mut(&mut lines)[..bytes.len()].copy_from_slice(bytes);
        Ok(Buffer { source: Arc::new(Owned { lines, len: bytes.len() }), range: 0..bytes.len() })
    }

    /// A range of somebody else's bytes; the range must lie inside them.
    pub fn share(source: Arc<dyn Bytes>, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= source.bytes().len());
        Buffer { source, range }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.source.bytes()[self.range.clone()]
    }

    /// The object that holds the bytes.
    pub fn source(&self) -> &Arc<dyn Bytes> {
        &self.source
    }
}

/// Type of a tensor's values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// Bytes.
    U8,
    /// Signed bytes.
    I8,
    /// Unsigned 64-bit integers.
    U64,
    /// IEEE half precision.
    F16,
    /// The upper half of a float32.
    Bf16,
    /// Single precision.
    F32,
}

impl Dtype {
    /// Bytes of one value.
    pub fn size(self) -> usize {
        match self {
            Dtype::U8 | Dtype::I8 => 1,
            Dtype::F16 | Dtype::Bf16 => 2,
            Dtype::F32 => 4,
            Dtype::U64 => 8,
        }
    }

    /// The name in a safetensors header.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::U8 => "U8",
            Dtype::I8 => "I8",
            Dtype::U64 => "U64",
            Dtype::F16 => "F16",
            Dtype::Bf16 => "BF16",
            Dtype::F32 => "F32",
        }
    }

    /// The type of a safetensors name, if it is one that tables use.
    pub fn from_name(name: &str) -> Option<Self> {
        let all = [Dtype::U8, Dtype::I8, Dtype::U64, Dtype::F16, Dtype::Bf16, Dtype::F32];
        all.into_iter().find(|d| d.name() == name)
    }
}

/// A named array.
#[derive(Clone)]
pub struct Tensor {
    /// Its name in the file, for example `codebooks.0`.
    pub name: String,
    /// Type of its values.
    pub dtype: Dtype,
    /// Its shape; values are row-major.
    pub shape: Vec<usize>,
    /// Its bytes, little-endian.
    pub data: Buffer,
}

impl Tensor {
    /// An array over existing bytes; their number must match the shape.
    pub fn new(name: impl Into<String>, dtype: Dtype, shape: Vec<usize>, data: Buffer) -> Result<Self> {
        let name = name.into();
        let wanted = shape.iter().try_fold(dtype.size(), |product, n| product.checked_mul(*n));
        if wanted != Some(data.bytes().len()) {
            let found = format!("{} bytes for shape {shape:?} of {}", data.bytes().len(), dtype.name());
            return Err(Error::shape("a tensor", found, "as many bytes as the shape needs"));
        }
        if data.bytes().as_ptr().align_offset(dtype.size()) != 0 {
            return Err(Error::shape("a tensor", "misaligned bytes", "values on their natural alignment"));
        }
        Ok(Tensor { name, dtype, shape, data })
    }

    /// `values` stored as `dtype` (float16 and bfloat16 round to nearest even). Fails where a finite value overflows.
    pub fn of_floats(name: impl Into<String>, dtype: Dtype, shape: Vec<usize>, values: &[f32]) -> Result<Self> {
        let name = name.into();
        let data = match dtype {
            Dtype::F32 => Buffer::copy_of(bytemuck::cast_slice(values))?,
            Dtype::F16 => {
                let mut halves = reserved(NEW, Some(values.len()))?;
                halves.extend(values.iter().map(|v| half::f16::from_f32(*v)));
                Buffer::copy_of(bytemuck::cast_slice(&halves))?
            }
            Dtype::Bf16 => {
                let mut halves = reserved(NEW, Some(values.len()))?;
                halves.extend(values.iter().map(|v| half::bf16::from_f32(*v)));
                Buffer::copy_of(bytemuck::cast_slice(&halves))?
            }
            Dtype::U8 | Dtype::I8 | Dtype::U64 => return Err(Error::shape("a tensor", dtype.name(), "a float type")),
        };
        let tensor = Tensor::new(name, dtype, shape, data)?;
        if !tensor.is_finite() {
            return Err(Error::OutOfRange {
                what: format!("{} does not fit {}", tensor.name, dtype.name()),
                why: "use a wider type, for example codebook_dtype=\"float32\"".into(),
            });
        }
        Ok(tensor)
    }

    /// The same array under another name.
    pub fn renamed(&self, name: impl Into<String>) -> Tensor {
        Tensor { name: name.into(), ..self.clone() }
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// True for an array without values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The 16-bit patterns of a float16 or bfloat16 array.
    pub fn halves(&self) -> &[u16] {
        bytemuck::cast_slice(self.data.bytes())
    }

    /// The values of an array of bytes with signs.
    pub fn integers(&self) -> &[i8] {
        bytemuck::cast_slice(self.data.bytes())
    }

    /// The values of a float32 array.
    pub fn floats(&self) -> &[f32] {
        bytemuck::cast_slice(self.data.bytes())
    }

    /// A copy of the values as float32.
    pub fn to_floats(&self) -> Vec<f32> {
        match self.dtype {
            Dtype::F32 => self.floats().to_vec(),
            Dtype::F16 => self.halves().iter().map(|h| half::f16::from_bits(*h).to_f32()).collect(),
            Dtype::Bf16 => self.halves().iter().map(|h| half::bf16::from_bits(*h).to_f32()).collect(),
            Dtype::U8 => self.data.bytes().iter().map(|b| f32::from(*b)).collect(),
            Dtype::I8 => self.integers().iter().map(|v| f32::from(*v)).collect(),
            Dtype::U64 => bytemuck::cast_slice::<u8, u64>(self.data.bytes()).iter().map(|v| *v as f32).collect(),
        }
    }

    /// False if a float array holds NaN or infinity.
    pub fn is_finite(&self) -> bool {
        // An exponent of all ones; folds without branches, so that the compiler can use vectors.
        let halves = |mask: u16| !self.halves().iter().fold(false, |bad, h| bad | (h & mask == mask));
        match self.dtype {
            Dtype::U8 | Dtype::I8 | Dtype::U64 => true,
            Dtype::F16 => halves(0x7c00),
            Dtype::Bf16 => halves(0x7f80),
            Dtype::F32 => !self.floats().iter().fold(false, |bad, v| bad | !v.is_finite()),
        }
    }
}
