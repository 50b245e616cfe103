//! Directories of the simulated disk: names as they are, names that are durable, and what lies between.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::Arc,
};

use parking_lot::Mutex;
use rand::Rng;

use super::{NameMap, content::Content, survivors};

/// A file, whatever its name.
#[derive(Default)]
pub(super) struct Node {
    pub(super) content: Mutex<Content>,
}

/// All directories. The root "" always exists.
#[derive(Default)]
pub(super) struct Names {
    dirs: BTreeMap<String, Dir>,
}

#[derive(Default)]
struct Dir {
    /// The directory's own name is durable.
    is_durable: bool,
    current: NameMap,
    durable: NameMap,
    pending: Vec<NameOp>,
}

#[derive(Clone)]
enum NameOp {
    Link(String, Arc<Node>),
    Unlink(String),
    Rename(String, String, Arc<Node>),
}

impl NameOp {
    fn apply(&self, names: &mut NameMap) {
        match self {
            Self::Link(name, node) => _ = names.insert(name.clone(), Arc::clone(node)),
            Self::Unlink(name) => _ = names.remove(name),
            Self::Rename(from, to, node) => {
                names.remove(from);
                names.insert(to.clone(), Arc::clone(node));
            }
        }
    }
}

fn split(name: &str) -> (&str, &str) {
    name.rsplit_once('/').unwrap_or(("", name))
}

impl Names {
    pub(super) fn find(&self, name: &str) -> io::Result<Arc<Node>> {
        let (dir, base) = split(name);
        self.dirs
            .get(dir)
            .and_then(|d| d.current.get(base))
            .map(Arc::clone)
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("{name}: no such file")))
    }

    pub(super) fn list(&self, dir: &str) -> Vec<String> {
        self.dirs.get(dir).map(|d| d.current.keys().cloned().collect()).unwrap_or_default()
    }

    fn dir(&mut self, dir: &str) -> io::Result<&mut Dir> {
        if dir.is_empty() {
            return Ok(self.dirs.entry(String::new()).or_default());
        }
        self.dirs
            .get_mut(dir)
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("{dir}: no such directory")))
    }

    fn change(&mut self, dir: &str, op: NameOp) -> io::Result<()> {
        let dir = self.dir(dir)?;
        op.apply(&mut dir.current);
        dir.pending.push(op);
        Ok(())
    }

    pub(super) fn link(&mut self, name: &str, node: Arc<Node>) -> io::Result<()> {
        let (dir, base) = split(name);
        self.change(dir, NameOp::Link(base.to_owned(), node))
    }

    pub(super) fn unlink(&mut self, name: &str) -> io::Result<()> {
        self.find(name)?;
        let (dir, base) = split(name);
        self.change(dir, NameOp::Unlink(base.to_owned()))
    }

    pub(super) fn rename(&mut self, from: &str, to: &str) -> io::Result<()> {
        let node = self.find(from)?;
        let ((dir, old), (to_dir, new)) = (split(from), split(to));
        if dir != to_dir {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "a rename stays in its directory"));
        }
        if old == new { Ok(()) } else { self.change(dir, NameOp::Rename(old.to_owned(), new.to_owned(), node)) }
    }

    pub(super) fn create_dir(&mut self, dir: &str) {
        for (i, _) in dir.match_indices('/').chain([(dir.len(), "")]) {
            self.dirs.entry(dir[..i].to_owned()).or_default();
        }
    }

    pub(super) fn sync_dir(&mut self, name: &str) -> io::Result<()> {
        let dir = self.dir(name)?;
        for op in std::mem::take(&mut dir.pending) {
            op.apply(&mut dir.durable);
        }
        for (child, dir) in &mut self.dirs {
            if !child.is_empty() && split(child).0 == name {
                dir.is_durable = true;
            }
        }
        Ok(())
    }

    pub(super) fn pages_used(&self) -> u64 {
        self.dirs.values().flat_map(|d| d.current.values()).map(|n| n.content.lock().pages_used()).sum()
    }

    pub(super) fn crash(&mut self, rng: &mut impl Rng) {
        let mut lost = Vec::new();
        for (name, dir) in &mut self.dirs {
            // The parent sorts before its children, so a lost one takes them along.
            let parent_lost = !name.is_empty() && lost.iter().any(|l: &String| split(name).0 == l);
            if parent_lost || !(name.is_empty() || dir.is_durable || rng.random()) {
                lost.push(name.clone());
                continue;
            }
            dir.is_durable = true;
            let pending = std::mem::take(&mut dir.pending);
            let kept = survivors(pending.len(), rng);
            for (op, _) in pending.iter().zip(kept).filter(|(_, kept)| *kept) {
                op.apply(&mut dir.durable);
            }
            dir.current = dir.durable.clone();
        }
        for name in lost {
            self.dirs.remove(&name);
        }
        let mut seen = BTreeSet::new();
        for node in self.dirs.values().flat_map(|d| d.current.values()) {
            if seen.insert(Arc::as_ptr(node)) {
                node.content.lock().crash(rng);
            }
        }
    }

    pub(super) fn fork(&self) -> Self {
        let mut copies: BTreeMap<*const Node, Arc<Node>> = BTreeMap::new();
        let mut copy = |node: &Arc<Node>| {
            let fresh = || Arc::new(Node { content: Mutex::new(node.content.lock().clone()) });
            Arc::clone(copies.entry(Arc::as_ptr(node)).or_insert_with(fresh))
        };
        let mut dirs = BTreeMap::new();
        for (name, dir) in &self.dirs {
            let mut map = |names: &NameMap| names.iter().map(|(n, node)| (n.clone(), copy(node))).collect::<NameMap>();
            let (current, durable) = (map(&dir.current), map(&dir.durable));
            let pending = dir.pending.iter().map(|op| match op {
                NameOp::Link(name, node) => NameOp::Link(name.clone(), copy(node)),
                NameOp::Unlink(name) => NameOp::Unlink(name.clone()),
                NameOp::Rename(from, to, node) => NameOp::Rename(from.clone(), to.clone(), copy(node)),
            });
            let pending = pending.collect();
            dirs.insert(name.clone(), Dir { is_durable: dir.is_durable, current, durable, pending });
        }
        Self { dirs }
    }
}
