//! Linear maps of rows: products, rotations, principal components. Everything that quantizers need of linear algebra,
//! without a library of it: matrices here have as many columns as embeddings.

use super::nearest::{interleave, Columns};
use crate::error::{copied, product, reserved, room, zeros, Error, Result};
use crate::kernels::{self, Kernels, Products};
use crate::matrix::{Matrix, Sample};
use crate::pool::Context;
use crate::rng::{mix, Rng};

/// Rows that are mapped, or added to a covariance, at a time.
const BLOCK_ROWS: usize = 256;

/// Rows of a task with so many products for each: some hundredths of a second.
fn block_rows(products: usize) -> usize {
    ((1 << 29) / products.max(1)).clamp(16, BLOCK_ROWS)
}

/// Vectors packed for scalar products with rows.
#[derive(Clone)]
pub struct Projection {
    kernels: &'static Kernels,
    panels: Vec<f32>,
    width: usize,
    count: usize,
}

impl Projection {
    /// Packs vectors of `width` values each.
    pub fn new(vectors: &[f32], width: usize) -> Self {
        let kernels = kernels::best();
        let panels = interleave(vectors, width, kernels.panel_centers);
        Projection { kernels, panels, width, count: vectors.len() / width }
    }

    /// Packs columns: each is a vector of as many values as there are rows.
    fn of_columns(x: Columns) -> Self {
        let kernels = kernels::best();
        let lanes = kernels.panel_centers;
        let mut panels = vec![0f32; x.width().next_multiple_of(lanes) * x.rows()];
        for (panel, start) in panels.chunks_mut(lanes * x.rows()).zip((0..x.width()).step_by(lanes)) {
            for (row, out) in panel.chunks_mut(lanes).enumerate() {
                let values = &x.row(row)[start..x.width().min(start + lanes)];
                out[..values.len()].copy_from_slice(values);
            }
        }
        Projection { kernels, panels, width: x.rows(), count: x.width() }
    }

    /// Number of vectors.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The product of each row with each vector, on the calling thread. Each is one chain of fused multiply-adds from
    /// zero, in the order of the columns.
    pub fn apply(&self, rows: Columns, out: &mut [f32]) {
        assert_eq!(rows.width(), self.width, "columns of the rows and of the vectors");
        let (x, stride) = rows.values();
        let task =
            Products { width: self.width, x, stride, rows: rows.rows(), centers: &self.panels, count: self.count };
        (self.kernels.dots)(&task, out);
    }

    /// The products of all rows, on all threads.
    pub fn apply_all(&self, rows: Columns, ctx: &Context) -> Result<Vec<f32>> {
        let mut out = zeros("products of rows", rows.rows().checked_mul(self.count))?;
        let size = block_rows(self.width * self.count);
        ctx.chunks(&mut out, size * self.count, |block, out| {
            let start = block * size;
            self.apply(rows.block(start..start + out.len() / self.count), out);
            Ok(())
        })?;
        Ok(out)
    }
}

/// A random rotation that costs a few additions a value and is made from its seed alone: rounds of random signs and
/// Walsh-Hadamard transforms (Ailon and Chazelle, 2009), in turns of the first and of the last 2^k columns where the number
/// of columns is no power of two.
#[derive(Clone, Debug)]
pub struct Hadamard {
    dim: usize,
    size: usize,
    signs: Vec<f32>,
    factor: f32,
}

impl Hadamard {
    /// The rotation of a seed.
    pub fn new(dim: usize, seed: u64, rounds: usize) -> Self {
        let size = 1 << dim.ilog2();
        let sign = |place: usize| if mix(seed.wrapping_add(place as u64)) >> 63 == 0 { 1.0 } else { -1.0 };
        let factor = (1.0 / (size as f64).sqrt()) as f32;
        let passes = if size < dim { 2 * rounds } else { rounds };
        Hadamard { dim, size, signs: (0..passes * dim).map(sign).collect(), factor }
    }

    /// Turns a row.
    pub fn turn(&self, row: &mut [f32]) {
        for (pass, signs) in self.signs.chunks(self.dim).enumerate() {
            row.iter_mut().zip(signs).for_each(|(value, sign)| *value *= sign);
            self.transform(&mut row[self.start(pass)..][..self.size]);
        }
    }

    /// Turns a row back.
    pub fn turn_back(&self, row: &mut [f32]) {
        for (pass, signs) in self.signs.chunks(self.dim).enumerate().rev() {
            self.transform(&mut row[self.start(pass)..][..self.size]);
            row.iter_mut().zip(signs).for_each(|(value, sign)| *value *= sign);
        }
    }

    /// The first columns and the last ones take turns. Signs stand before both: without them the second transform would
    /// nearly undo the first where 2^k is a little less than the number of columns.
    fn start(&self, pass: usize) -> usize {
        if pass.is_multiple_of(2) {
            0
        } else {
            self.dim - self.size
        }
    }

    fn transform(&self, values: &mut [f32]) {
        (kernels::best().hadamard)(values, self.factor);
    }
}

/// Weighted mean of the rows.
pub fn mean(data: Sample, ctx: &Context) -> Result<Vec<f32>> {
    let dim = data.dim();
    let blocks = data.len().div_ceil(BLOCK_ROWS);
    let parts = ctx.map(blocks, |block| {
        let mut sums = vec![0f64; dim];
        let mut total = 0f64;
        for row in block * BLOCK_ROWS..data.len().min((block + 1) * BLOCK_ROWS) {
            let weight = data.weights.map_or(1.0, |w| w[row]);
            total += weight;
            sums.iter_mut().zip(data.rows.row(row)).for_each(|(sum, value)| *sum += weight * f64::from(*value));
        }
        Ok((sums, total))
    })?;
    let (mut sums, mut total) = (vec![0f64; dim], 0f64);
    for (part, weight) in parts {
        sums.iter_mut().zip(part).for_each(|(sum, value)| *sum += value);
        total += weight;
    }
    Ok(sums.into_iter().map(|sum| (sum / total) as f32).collect())
}

/// Weighted second moments of the rows, `dim` x `dim`, over the sum of the weights.
pub fn second_moments(data: Sample, ctx: &Context) -> Result<Vec<f64>> {
    let mut moments = cross_moments(data.rows.into(), data.rows.into(), data.weights, ctx)?;
    let total = data.weights.map_or(data.len() as f64, |w| w.iter().map(|weight| weight / unit(w)).sum());
    moments.iter_mut().for_each(|value| *value /= total);
    Ok(moments)
}

/// A power of two near the largest weight: weights over it fit float32, whatever their size.
fn unit(weights: &[f64]) -> f64 {
    let largest = weights.iter().fold(f64::MIN_POSITIVE, |m, weight| m.max(*weight));
    f64::from_bits(largest.to_bits() & 0x7ff0_0000_0000_0000)
}

/// Columns of rotations that are computed: their matrices of float64 take 512 MiB.
pub const MOST_COLUMNS: usize = 8192;

/// Refuses matrices that would take too long, or more memory than there is.
pub fn check_columns(dim: usize) -> Result<()> {
    if dim > MOST_COLUMNS {
        let allowed = format!("\"random\" and None alone are for rows of more than {MOST_COLUMNS} columns");
        return Err(Error::parameter("rotation", format!("for {dim} columns"), allowed));
    }
    Ok(())
}

/// Sums over rows of weight · xᵢ · yⱼ: products of columns, `x.width()` x `y.width()`; weights count over the power of
/// two below the largest.
pub fn cross_moments(x: Columns, y: Columns, weights: Option<&[f64]>, ctx: &Context) -> Result<Vec<f64>> {
    /// Rows whose products are added in float32, and tasks that each add blocks of them in float64.
    const ROWS: usize = 1024;
    const TASKS: usize = 16;
    /// Values that all tasks hold at most.
    const VALUES: usize = 1 << 26;
    let (width, others) = (x.width(), y.width());
    let blocks = x.rows().div_ceil(ROWS);
    let tasks = blocks.min(TASKS).min(VALUES / (width * others)).max(1);
    let unit = weights.map_or(1.0, unit);
    let parts = ctx.map(tasks, |task| {
        let mut sums: Vec<f64> = zeros("products of columns", width.checked_mul(others))?;
        let mut products: Vec<f32> = zeros("products of columns", width.checked_mul(others))?;
        for block in (task..blocks).step_by(tasks) {
            ctx.check()?;
            let rows = block * ROWS..x.rows().min((block + 1) * ROWS);
            let left = transposed(x.block(rows.clone()), weights.map(|w| &w[rows.clone()]), unit);
            let right = Projection::of_columns(y.block(rows.clone()));
            let left = Columns::contiguous(&left, rows.len());
            let size = block_rows(rows.len() * others);
            for (block, products) in products.chunks_mut(size * others).enumerate() {
                ctx.check()?;
                right.apply(left.block(block * size..block * size + products.len() / others), products);
            }
            sums.iter_mut().zip(&products).for_each(|(sum, value)| *sum += f64::from(*value));
        }
        Ok(sums)
    })?;
    let mut sums: Vec<f64> = zeros("products of columns", width.checked_mul(others))?;
    for part in parts {
        sums.iter_mut().zip(part).for_each(|(sum, value)| *sum += value);
    }
    Ok(sums)
}

/// Columns one after the other, each value times its row's weight over `unit`.
fn transposed(x: Columns, weights: Option<&[f64]>, unit: f64) -> Vec<f32> {
    /// Rows and columns that are turned over together: their cache lines are read and written whole.
    const TILE: usize = 16;
    let count = x.rows();
    let mut out = vec![0f32; x.width() * count];
    for first in (0..count).step_by(TILE) {
        for start in (0..x.width()).step_by(TILE) {
            let end = x.width().min(start + TILE);
            for row in first..count.min(first + TILE) {
                let weight = weights.map_or(1.0, |w| (w[row] / unit) as f32);
                for (column, value) in (start..end).zip(&x.row(row)[start..end]) {
                    out[column * count + row] = value * weight;
                }
            }
        }
    }
    out
}

/// `rows` x `columns` to `columns` x `rows`.
pub fn transpose(matrix: &[f32], columns: usize) -> Vec<f32> {
    transposed(Columns::contiguous(matrix, columns), None, 1.0)
}

/// Eigenvalues of a symmetric matrix, the largest first, and their eigenvectors, one a row.
///
/// Householder's tridiagonal form, then QL iterations with implicit shifts (Wilkinson and Reinsch, 1971).
pub fn eigen(matrix: &[f64], dim: usize, ctx: &Context) -> Result<(Vec<f64>, Vec<f32>)> {
    let mut vectors = copied("a rotation", matrix)?;
    let (mut diagonal, mut beside) = tridiagonal(&mut vectors, dim, ctx)?;
    // Rows are eigenvectors in the making: rotations then run along memory.
    let mut rows: Vec<f64> = zeros("a rotation", dim.checked_mul(dim))?;
    for i in 0..dim {
        ctx.check()?;
        for j in 0..dim {
            rows[j * dim + i] = vectors[i * dim + j];
        }
    }
    ql(&mut diagonal, &mut beside, &mut rows, dim, ctx)?;
    let mut order: Vec<usize> = (0..dim).collect();
    order.sort_by(|a, b| diagonal[*b].total_cmp(&diagonal[*a]).then(a.cmp(b)));
    let values = order.iter().map(|place| diagonal[*place].max(0.0)).collect();
    let mut sorted = reserved("a rotation", dim.checked_mul(dim))?;
    for place in order {
        let row = &rows[place * dim..(place + 1) * dim];
        // The sign is free: the largest coordinate is positive, so that every machine agrees.
        let largest = row.iter().fold(0f64, |m, v| if v.abs() > m.abs() { *v } else { m });
        let sign = if largest < 0.0 { -1.0 } else { 1.0 };
        sorted.extend(row.iter().map(|value| (sign * value) as f32));
    }
    Ok((values, sorted))
}

/// Reduces a symmetric matrix; it becomes the orthogonal transformation. Returns the diagonal and what stands beside it,
/// whose first value is unused.
fn tridiagonal(a: &mut [f64], dim: usize, ctx: &Context) -> Result<(Vec<f64>, Vec<f64>)> {
    let (mut diagonal, mut beside) = (vec![0f64; dim], vec![0f64; dim]);
    for i in (1..dim).rev() {
        ctx.check()?;
        let mut h = 0.0;
        let scale: f64 = if i > 1 { a[i * dim..i * dim + i].iter().map(|v| v.abs()).sum() } else { 0.0 };
        if scale == 0.0 {
            beside[i] = a[i * dim + i - 1];
        } else {
            for k in 0..i {
                a[i * dim + k] /= scale;
                h += a[i * dim + k] * a[i * dim + k];
            }
            let f = a[i * dim + i - 1];
            let g = if f >= 0.0 { -h.sqrt() } else { h.sqrt() };
            beside[i] = scale * g;
            h -= f * g;
            a[i * dim + i - 1] = f - g;
            let (upper, lower) = a.split_at_mut(i * dim);
            let row = &lower[..i];
            // p = A u / h, by rows of the lower triangle.
            let mut p = vec![0f64; i];
            for j in 0..i {
                let line = &upper[j * dim..j * dim + j + 1];
                let mut sum = 0.0;
                for k in 0..j {
                    sum += line[k] * row[k];
                    p[k] += line[k] * row[j];
                }
                p[j] += sum + line[j] * row[j];
            }
            let mut f = 0.0;
            for j in 0..i {
                p[j] /= h;
                f += p[j] * row[j];
            }
            let hh = f / (h + h);
            for j in 0..i {
                p[j] -= hh * row[j];
            }
            for j in 0..i {
                let (f, g) = (row[j], p[j]);
                for k in 0..=j {
                    upper[j * dim + k] -= f * p[k] + g * row[k];
                }
            }
            for j in 0..i {
                upper[j * dim + i] = row[j] / h;
            }
        }
        diagonal[i] = h;
    }
    diagonal[0] = 0.0;
    let mut factors = vec![0f64; dim];
    for i in 0..dim {
        ctx.check()?;
        if diagonal[i] != 0.0 {
            // Each column of the part so far loses its share of the reflection.
            factors[..i].fill(0.0);
            let (upper, lower) = a.split_at_mut(i * dim);
            for k in 0..i {
                let share = lower[k];
                let line = &upper[k * dim..k * dim + i];
                factors[..i].iter_mut().zip(line).for_each(|(f, v)| *f += share * v);
            }
            for k in 0..i {
                let by = upper[k * dim + i];
                let line = &mut upper[k * dim..k * dim + i];
                line.iter_mut().zip(&factors[..i]).for_each(|(v, f)| *v -= by * f);
            }
        }
        diagonal[i] = a[i * dim + i];
        a[i * dim + i] = 1.0;
        for j in 0..i {
            a[j * dim + i] = 0.0;
            a[i * dim + j] = 0.0;
        }
    }
    Ok((diagonal, beside))
}

/// Diagonalises a tridiagonal matrix; each rotation is applied to two rows of `rows`.
fn ql(diagonal: &mut [f64], beside: &mut [f64], rows: &mut [f64], dim: usize, ctx: &Context) -> Result<()> {
    /// Far more than are ever needed: then the value stays as near as it came.
    const MOST: usize = 60;
    beside.rotate_left(1);
    beside[dim - 1] = 0.0;
    for l in 0..dim {
        ctx.check()?;
        for _ in 0..MOST {
            let small = |m: usize, d: &[f64], e: &[f64]| e[m].abs() <= f64::EPSILON * (d[m].abs() + d[m + 1].abs());
            let m = (l..dim - 1).find(|m| small(*m, diagonal, beside)).unwrap_or(dim - 1);
            if m == l {
                break;
            }
            let mut g = (diagonal[l + 1] - diagonal[l]) / (2.0 * beside[l]);
            let r = (g * g + 1.0).sqrt();
            g = diagonal[m] - diagonal[l] + beside[l] / (g + if g >= 0.0 { r } else { -r });
            let (mut s, mut c, mut p) = (1.0, 1.0, 0.0);
            let mut early = false;
            for i in (l..m).rev() {
                let (f, b) = (s * beside[i], c * beside[i]);
                let r = (f * f + g * g).sqrt();
                beside[i + 1] = r;
                if r == 0.0 {
                    diagonal[i + 1] -= p;
                    beside[m] = 0.0;
                    early = true;
                    break;
                }
                (s, c) = (f / r, g / r);
                g = diagonal[i + 1] - p;
                let r = (diagonal[i] - g) * s + 2.0 * c * b;
                p = s * r;
                diagonal[i + 1] = g + p;
                g = c * r - b;
                let (first, second) = rows.split_at_mut((i + 1) * dim);
                for (a, b) in first[i * dim..].iter_mut().zip(&mut second[..dim]) {
                    (*a, *b) = (c * *a - s * *b, s * *a + c * *b);
                }
            }
            if !early {
                diagonal[l] -= p;
                beside[l] = g;
                beside[m] = 0.0;
            }
        }
    }
    Ok(())
}

/// The orthogonal matrix nearest to a square one, that is U·Vᵀ of its singular value decomposition (Procrustes), by
/// Newton and Schulz's iteration: products alone (Higham, 1986). Directions that the matrix loses stay as they are.
pub fn nearest_orthogonal(matrix: &[f32], dim: usize, ctx: &Context) -> Result<Vec<f32>> {
    const MOST: usize = 60;
    room("a rotation", &[product(&[dim, dim, 24])])?;
    let mut x = matrix.to_vec();
    let size = largest_gain(&x, dim, ctx)?;
    if size == 0.0 {
        return Ok(identity(dim));
    }
    x.iter_mut().for_each(|value| *value = (f64::from(*value) / size) as f32);
    for _ in 0..MOST {
        ctx.check()?;
        // x <- 1.5 x - 0.5 x xᵀ x
        let gram = Projection::new(&x, dim).apply_all(Columns::contiguous(&x, dim), ctx)?;
        let off = gram.iter().enumerate().map(|(at, v)| (f64::from(*v) - f64::from(at / dim == at % dim)).abs());
        let off = off.fold(0.0, f64::max);
        let product = Projection::new(&transpose(&x, dim), dim).apply_all(Columns::contiguous(&gram, dim), ctx)?;
        x.iter_mut().zip(product).for_each(|(value, product)| *value = 1.5 * *value - 0.5 * product);
        if off < 1e-3 {
            break;
        }
    }
    orthonormalize(&mut x, dim, ctx)?;
    Ok(x)
}

/// An upper bound, not far off, of what the matrix multiplies norms by.
fn largest_gain(matrix: &[f32], dim: usize, ctx: &Context) -> Result<f64> {
    const STEPS: usize = 12;
    let (rows, columns) = (Projection::new(matrix, dim), Projection::new(&transpose(matrix, dim), dim));
    let mut rng = Rng::new(dim as u64);
    let mut vector: Vec<f32> = (0..dim).map(|_| rng.normal() as f32).collect();
    let mut gain = 0.0;
    for _ in 0..STEPS {
        ctx.check()?;
        let before = norm(&vector);
        if before == 0.0 {
            return Ok(0.0);
        }
        vector.iter_mut().for_each(|value| *value = (f64::from(*value) / before) as f32);
        let mut image = vec![0f32; dim];
        rows.apply(Columns::contiguous(&vector, dim), &mut image);
        gain = norm(&image);
        columns.apply(Columns::contiguous(&image, dim), &mut vector);
    }
    // The iteration converges for gains below the root of three.
    Ok(1.1 * gain)
}

/// Gram and Schmidt, in order. Directions that vanish become those of the axes that are left.
pub fn orthonormalize(rows: &mut [f32], dim: usize, ctx: &Context) -> Result<()> {
    let mut axis = 0;
    for at in 0..rows.len() / dim {
        ctx.check()?;
        let (before, rest) = rows.split_at_mut(at * dim);
        let row = &mut rest[..dim];
        loop {
            let size = norm(row);
            // Twice is enough to be orthogonal to rounding.
            for _ in 0..2 {
                for other in before.chunks(dim) {
                    let share = other.iter().zip(&*row).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
                    row.iter_mut().zip(other).for_each(|(value, other)| *value -= share as f32 * other);
                }
            }
            let left = norm(row);
            if left > 1e-4 * size {
                row.iter_mut().for_each(|value| *value = (f64::from(*value) / left) as f32);
                break;
            }
            row.fill(0.0);
            row[axis % dim] = 1.0;
            axis += 1;
        }
    }
    Ok(())
}

/// Orthonormal rows, as random as a seed makes them.
pub fn random_rotation(dim: usize, seed: u64, ctx: &Context) -> Result<Vec<f32>> {
    let mut rng = Rng::new(seed);
    let mut rows: Vec<f32> = zeros("a rotation", dim.checked_mul(dim))?;
    for row in rows.chunks_mut(dim) {
        ctx.check()?;
        row.iter_mut().for_each(|value| *value = rng.normal() as f32);
    }
    orthonormalize(&mut rows, dim, ctx)?;
    Ok(rows)
}

/// Ones on the diagonal.
pub fn identity(dim: usize) -> Vec<f32> {
    let mut matrix = vec![0f32; dim * dim];
    matrix.iter_mut().step_by(dim + 1).for_each(|value| *value = 1.0);
    matrix
}

/// Rows less a row.
pub fn centred(rows: Matrix, mean: &[f32]) -> Vec<f32> {
    let mut out = rows.data().to_vec();
    for row in out.chunks_mut(mean.len()) {
        row.iter_mut().zip(mean).for_each(|(value, mean)| *value -= mean);
    }
    out
}

fn norm(values: &[f32]) -> f64 {
    values.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normal(rows: usize, dim: usize, seed: u64) -> Vec<f32> {
        let mut rng = Rng::new(seed);
        (0..rows * dim).map(|_| rng.normal() as f32).collect()
    }

    fn is_orthonormal(rows: &[f32], dim: usize, tolerance: f64) {
        for (i, a) in rows.chunks(dim).enumerate() {
            for (j, b) in rows.chunks(dim).enumerate() {
                let product: f64 = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                assert!((product - f64::from(i == j)).abs() < tolerance, "{i} {j} {product}");
            }
        }
    }

    #[test]
    fn eigenvectors_rebuild_the_matrix() {
        let ctx = Context::new(Some(2), 0);
        for dim in [1, 2, 3, 17, 64] {
            let x = normal(3 * dim, dim, dim as u64);
            let data = Sample::new(Matrix::new(&x, dim).unwrap(), None, &Context::default()).unwrap();
            let matrix = second_moments(data, &ctx).unwrap();
            let (values, vectors) = eigen(&matrix, dim, &ctx).unwrap();
            is_orthonormal(&vectors, dim, 1e-6);
            assert!(values.windows(2).all(|w| w[0] >= w[1]));
            for i in 0..dim {
                for j in 0..dim {
                    let rebuilt: f64 = (0..dim)
                        .map(|k| values[k] * f64::from(vectors[k * dim + i]) * f64::from(vectors[k * dim + j]))
                        .sum();
                    assert!((rebuilt - matrix[i * dim + j]).abs() < 1e-5, "{dim} {i} {j}");
                }
            }
        }
    }

    #[test]
    fn eigenvalues_of_flat_and_empty_matrices() {
        let ctx = Context::new(Some(1), 0);
        let (values, vectors) = eigen(&[0.0; 25], 5, &ctx).unwrap();
        assert_eq!(values, [0.0; 5]);
        is_orthonormal(&vectors, 5, 1e-6);
        let unit: Vec<f64> = identity(6).into_iter().map(f64::from).collect();
        assert_eq!(eigen(&unit, 6, &ctx).unwrap().0, [1.0; 6]);
    }

    #[test]
    fn hadamard_turns_there_and_back_and_mixes() {
        for dim in [1, 2, 3, 100, 128, 129, 257, 300, 520, 1025] {
            let rotation = Hadamard::new(dim, 7, 3);
            let x = normal(1, dim, 1);
            let mut y = x.clone();
            rotation.turn(&mut y);
            assert!((norm(&x) - norm(&y)).abs() < 1e-4 * norm(&x));
            rotation.turn_back(&mut y);
            assert!(x.iter().zip(&y).all(|(a, b)| (a - b).abs() < 1e-5), "{dim}");
            let mut spike = vec![0f32; dim];
            spike[dim / 2] = 1.0;
            rotation.turn(&mut spike);
            let largest = spike.iter().fold(0f32, |m, v| m.max(v.abs()));
            assert!(dim < 100 || largest < 0.45, "{dim} {largest}");
        }
    }

    #[test]
    fn nearest_orthogonal_finds_a_hidden_rotation() {
        let ctx = Context::new(Some(2), 0);
        for dim in [1, 5, 48] {
            let rotation = random_rotation(dim, 3, &ctx).unwrap();
            is_orthonormal(&rotation, dim, 1e-5);
            // A positive definite factor behind a rotation is what the polar decomposition takes off.
            let x = normal(2 * dim, dim, 4);
            let data = Sample::new(Matrix::new(&x, dim).unwrap(), None, &Context::default()).unwrap();
            let positive: Vec<f32> = second_moments(data, &ctx).unwrap().iter().map(|v| *v as f32).collect();
            let product = Projection::new(&transpose(&rotation, dim), dim);
            let mixed = product.apply_all(Columns::contiguous(&positive, dim), &ctx).unwrap();
            let found = nearest_orthogonal(&mixed, dim, &ctx).unwrap();
            is_orthonormal(&found, dim, 1e-5);
            let worst = found.iter().zip(&rotation).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
            assert!(worst < 2e-3, "{dim} {worst}");
        }
    }

    #[test]
    fn lost_directions_are_filled() {
        let ctx = Context::new(Some(1), 0);
        let mut rows = vec![1f32, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        orthonormalize(&mut rows, 3, &ctx).unwrap();
        is_orthonormal(&rows, 3, 1e-6);
        is_orthonormal(&nearest_orthogonal(&[0.0; 9], 3, &ctx).unwrap(), 3, 1e-6);
    }
}
