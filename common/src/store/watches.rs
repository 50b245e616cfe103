//! Ranges that somebody looks at in order to act on what is there, and whether they were written meanwhile.

use crate::types::BlockRange;

/// What is looked at now: few, as many as there are such requests.
#[derive(Debug, Default)]
pub(super) struct Watches {
    watched: Vec<(u64, BlockRange, bool)>,
    next_id: u64,
}

impl Watches {
    /// Begins to watch a range; the number ends it.
    pub(super) fn begin(&mut self, range: BlockRange) -> u64 {
        self.next_id += 1;
        self.watched.push((self.next_id, range, false));
        self.next_id
    }

    /// Whether the range was touched since it began, or since it was last asked for.
    pub(super) fn take_touched(&mut self, id: u64) -> bool {
        self.watched.iter_mut().find(|watched| watched.0 == id).is_some_and(|watched| std::mem::take(&mut watched.2))
    }

    /// Ends it; whether it was touched, as [`Self::take_touched`] says.
    pub(super) fn end(&mut self, id: u64) -> bool {
        let touched = self.take_touched(id);
        self.watched.retain(|watched| watched.0 != id);
        touched
    }

    /// These blocks change; without a range, any may.
    pub(super) fn touch(&mut self, range: Option<BlockRange>) {
        for (_, watched, touched) in &mut self.watched {
            *touched |= range.is_none_or(|range| {
                watched.volume == range.volume && watched.first < range.end() && range.first < watched.end()
            });
        }
    }
}
