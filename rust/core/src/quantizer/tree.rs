//! Tree-structured quantization (Buzo, Gray, Gray and Markel, 1980): k-means in each cluster of a k-means, and so on. A row
//! is a path from the root; what it decodes to is the leaf.
//!
//! Only leaves are stored. The nodes above, which encoding passes, are the means of their leaves.

use super::{check_codebooks, check_loop, encode_nearest, group, within, Encoder, Learned, Quantizer};
use crate::algo::kmeans::KMeans;
use crate::algo::nearest::{Centroids, Columns};
use crate::bits;
use crate::decoder::{Books, CodebookDtype, Decoder};
use crate::error::{product, reserved, room, zeros, Error, Result};
use crate::matrix::{Matrix, Sample};
use crate::pool::Context;
use serde::{Deserialize, Serialize};

/// Parameters of tree-structured quantization.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TreeQuantizer {
    branching: usize,
    depth: usize,
    beam_width: usize,
    max_iter: usize,
    tol: f64,
    codebook_dtype: CodebookDtype,
}

impl Default for TreeQuantizer {
    fn default() -> Self {
        TreeQuantizer {
            branching: 16,
            depth: 2,
            beam_width: 4,
            max_iter: 25,
            tol: 1e-4,
            codebook_dtype: CodebookDtype::Float16,
        }
    }
}

/// Nodes of one level that have rows of their own.
struct Level {
    /// The node of each row.
    nodes: Vec<u32>,
    /// All nodes' centres.
    centers: Vec<f32>,
}

impl TreeQuantizer {
    /// Number of leaves, if it is one that codes can tell apart.
    fn leaves(&self) -> Option<usize> {
        let count = u32::try_from(self.depth).ok().and_then(|depth| self.branching.checked_pow(depth));
        count.filter(|count| *count <= 1 << bits::MAX_BITS)
    }

    /// Bits of a leaf's number.
    fn bits(&self) -> Result<(usize, u32)> {
        let expected = format!("at most 2^{} leaves", bits::MAX_BITS);
        let leaves = self.leaves().ok_or_else(|| Error::parameter("depth", self.depth, expected))?;
        Ok((leaves, usize::BITS - (leaves - 1).max(1).leading_zeros()))
    }

    fn books(&self, dim: usize, centers: Vec<f32>) -> Result<Decoder> {
        let (leaves, bits) = self.bits()?;
        let group = group(dim, leaves, vec![0]);
        Ok(Decoder::Books(Books::new(dim, bits, self.codebook_dtype, vec![(group, centers)])?))
    }

    /// Clusters the rows of each node. Returns the next level and the most iterations.
    fn split(&self, data: Sample, level: &Level, ctx: &Context) -> Result<(Level, usize)> {
        let (dim, count) = (data.dim(), level.centers.len() / data.dim());
        room("the nodes", &[product(&[data.len(), 16]), product(&[count, self.branching, dim, 8])])?;
        let mut members = vec![Vec::new(); count];
        for (row, node) in level.nodes.iter().enumerate() {
            members[*node as usize].push(row);
        }
        let cluster = |node: usize, ctx: &Context| {
            let ctx = ctx.with_seed(ctx.seed.wrapping_add(node as u64));
            ctx.advance(1);
            self.children(data, &members[node], &level.centers[node * dim..(node + 1) * dim], &ctx)
        };
        // Nodes side by side, each on one thread, or where they are few one after the other on all.
        let found = match count >= 2 * ctx.threads() {
            true => ctx.map(count, |node| cluster(node, &ctx.serial()))?,
            false => (0..count).map(|node| cluster(node, ctx)).collect::<Result<Vec<_>>>()?,
        };
        let nodes = zeros("the nodes", Some(data.len()))?;
        let size = product(&[count, self.branching, dim]);
        let mut next = Level { nodes, centers: reserved("the nodes", size)? };
        let mut n_iter = 0;
        for (node, (children, members)) in found.iter().zip(&members).enumerate() {
            for (row, label) in members.iter().zip(&children.labels) {
                next.nodes[*row] = (node * self.branching) as u32 + label;
            }
            next.centers.extend(&children.centers);
            n_iter = n_iter.max(children.n_iter);
        }
        Ok((next, n_iter))
    }

    /// The clusters of some rows; `center` is what a node without rows consists of.
    fn children(&self, data: Sample, members: &[usize], center: &[f32], ctx: &Context) -> Result<Children> {
        let dim = data.dim();
        if members.is_empty() {
            return Ok(Children { centers: center.repeat(self.branching), labels: Vec::new(), n_iter: 0 });
        }
        let mut rows = reserved("the rows of a node", members.len().checked_mul(dim))?;
        rows.extend(members.iter().flat_map(|row| data.rows.row(*row)));
        let weights: Option<Vec<f64>> = data.weights.map(|all| members.iter().map(|row| all[*row]).collect());
        let weights = weights.as_deref().filter(|all| all.iter().any(|weight| *weight > 0.0));
        let clusters = self.branching.min(members.len());
        let kmeans = KMeans { max_iter: self.max_iter, tol: self.tol, ..KMeans::new(clusters) };
        let found = kmeans.fit(Columns::contiguous(&rows, dim), weights, ctx)?;
        // Fewer distinct rows than branches: the centres repeat in turn, so that their mean stays near that of the rows.
        let distinct = found.distinct;
        let place = |branch: usize| branch % distinct;
        let centers =
            (0..self.branching).flat_map(|branch| &found.centers[place(branch) * dim..(place(branch) + 1) * dim]);
        Ok(Children { centers: centers.copied().collect(), labels: found.labels, n_iter: found.n_iter })
    }

    /// The children of all nodes from the root down, as centres to search.
    fn descent(&self, leaves: &[f32], dim: usize) -> Vec<Vec<Centroids>> {
        let mut nodes: Vec<f64> = leaves.iter().map(|value| f64::from(*value)).collect();
        let mut levels = Vec::new();
        for _ in 0..self.depth {
            let values: Vec<f32> = nodes.iter().map(|value| *value as f32).collect();
            let children = values.chunks(self.branching * dim);
            levels.push(children.map(|children| Centroids::new(children, dim)).collect());
            nodes = nodes.chunks(self.branching * dim).flat_map(|children| mean(children, dim)).collect();
        }
        levels.reverse();
        levels
    }

    /// The leaf that a beam finds for each row.
    fn leaves_of(&self, rows: Matrix, levels: &[Vec<Centroids>]) -> Result<Vec<u32>> {
        let branching = self.branching;
        let mut beams: Vec<Vec<u32>> = vec![vec![0]; rows.rows()];
        for parents in levels {
            // Rows by the nodes of their beams, so that a node's children are compared with all of its rows together.
            let mut visits: Vec<(u32, usize)> = Vec::new();
            for (row, beam) in beams.iter().enumerate() {
                visits.extend(beam.iter().map(|node| (*node, row)));
            }
            visits.sort_unstable();
            let mut found: Vec<Vec<(f32, u32)>> = vec![Vec::new(); rows.rows()];
            for visits in visits.chunk_by(|a, b| a.0 == b.0) {
                let node = visits[0].0;
                let values: Vec<f32> = visits.iter().flat_map(|(_, row)| rows.row(*row)).copied().collect();
                let mut distances = vec![0f32; visits.len() * branching];
                let values = Columns::contiguous(&values, rows.dim());
                parents[node as usize].distances_block(values, &mut distances);
                for ((_, row), distances) in visits.iter().zip(distances.chunks(branching)) {
                    let first = node * branching as u32;
                    found[*row].extend((first..).zip(distances).map(|(child, distance)| (*distance, child)));
                }
            }
            for (beam, mut found) in beams.iter_mut().zip(found) {
                let nearer = |a: &(f32, u32), b: &(f32, u32)| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1));
                if found.len() > self.beam_width {
                    found.select_nth_unstable_by(self.beam_width - 1, nearer);
                    found.truncate(self.beam_width);
                }
                found.sort_unstable_by(nearer);
                *beam = found.into_iter().map(|(_, child)| child).collect();
            }
        }
        Ok(beams.into_iter().map(|beam| beam[0]).collect())
    }
}

/// A node's clusters.
struct Children {
    centers: Vec<f32>,
    labels: Vec<u32>,
    n_iter: usize,
}

/// The mean of some rows.
fn mean(rows: &[f64], dim: usize) -> Vec<f64> {
    let mut mean = vec![0f64; dim];
    for row in rows.chunks(dim) {
        mean.iter_mut().zip(row).for_each(|(mean, value)| *mean += value);
    }
    let count = (rows.len() / dim) as f64;
    mean.iter_mut().for_each(|value| *value /= count);
    mean
}

impl Quantizer for TreeQuantizer {
    const NAME: &'static str = "tree";
    const ABOUT: &'static str = "each row becomes a leaf of a tree of centroids";

    fn check(&self) -> Result<()> {
        within("branching", self.branching, 2, 1 << 16)?;
        within("depth", self.depth, 1, bits::MAX_BITS as usize)?;
        within("beam_width", self.beam_width, 1, 1 << bits::MAX_BITS)?;
        self.bits()?;
        check_loop(self.max_iter, self.tol)
    }

    fn blank(&self, _: usize, dim: usize) -> Result<Decoder> {
        let (leaves, bits) = self.bits()?;
        check_codebooks(dim, bits)?;
        self.books(dim, zeros("the leaves", leaves.checked_mul(dim))?)
    }

    fn fit(&self, data: Sample, ctx: &Context) -> Result<Learned> {
        let (leaves, bits) = self.bits()?;
        check_codebooks(data.dim(), bits)?;
        let mut notes = Vec::new();
        if data.len() < leaves {
            notes.push(format!("{} rows are fewer than {leaves} leaves: some leaves are equal", data.len()));
        }
        let mut level = Level { nodes: vec![0; data.len()], centers: vec![0.0; data.dim()] };
        let mut n_iter = 0;
        for number in 0..self.depth {
            ctx.stage("k-means", self.branching.pow(number as u32) as u64);
            let seed = ctx.seed.wrapping_add((number as u64) << 32);
            let (next, longest) = self.split(data, &level, &ctx.with_seed(seed))?;
            (level, n_iter) = (next, n_iter.max(longest));
        }
        let decoder = self.books(data.dim(), level.centers)?;
        let bytes = decoder.row_bytes();
        let mut codes = zeros("the codes", data.len().checked_mul(bytes))?;
        for (leaf, code) in level.nodes.iter().zip(codes.chunks_mut(bytes)) {
            bits::pack([*leaf].into_iter(), bits, code);
        }
        Ok(Learned { decoder, codes: Some(codes), n_iter, notes })
    }

    fn encoder<'a>(&'a self, decoder: &'a Decoder, _: &Context) -> Result<Encoder<'a>> {
        let (leaves, bits) = self.bits()?;
        // A beam that holds all nodes above the leaves finds the nearest leaf, which is there faster without them.
        if self.beam_width >= leaves / self.branching {
            return encode_nearest(decoder);
        }
        let Decoder::Books(books) = decoder else {
            return Err(Error::shape("the decoder", decoder.form(), "the form books"));
        };
        let (_, dim, values) = books.books().swap_remove(0);
        if values.len() != leaves * dim || dim != books.dim() {
            return Err(Error::shape("the decoder", format!("{} leaves", values.len() / dim), format!("{leaves}")));
        }
        let levels = self.descent(&values, dim);
        Ok(Box::new(move |rows: Matrix, codes: &mut [u8]| {
            let bytes = codes.len() / rows.rows();
            for (leaf, code) in self.leaves_of(rows, &levels)?.into_iter().zip(codes.chunks_mut(bytes)) {
                bits::pack([leaf].into_iter(), bits, code);
            }
            Ok(())
        }))
    }
}
