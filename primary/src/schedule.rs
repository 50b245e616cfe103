//! Which lane's record goes next. Pure: times come in as arguments, records as values.
//!
//! - A record goes when everything that must be sent before it was ([`SentFirst`]). What is missing is *pulled*: its
//!   lane is sent up to there, in its own order, whatever its pace. A record that must go first has a lower LSN, so a
//!   chain of them ends.
//! - Pulled lanes go first, then immediate ones and those that hold more than their share of the journal, the oldest
//!   record first; then paced lanes with records left in their period.

use std::{collections::VecDeque, time::Duration};

use understudy_common::{
    lane::{LANES_MAX, LaneClass, Lanes},
    store::{LaneSpan, SentFirst},
    types::Lsn,
};

/// A record that may be sent.
#[derive(Debug)]
pub(crate) struct Head<T> {
    pub lsn: Lsn,
    pub first: SentFirst,
    pub record: T,
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// Send the first record of this lane.
    Send(u8),
    /// Look for records of this lane, from its cursor on.
    Fetch(u8),
    /// Nothing may be sent now.
    Wait,
}

/// How many records of a paced lane may be sent.
#[derive(Debug, Clone, Copy)]
struct Pace {
    items: u32,
    every: Duration,
    left: u32,
    until: Duration,
}

#[derive(Debug)]
struct Queue<T> {
    /// Found and not sent.
    heads: VecDeque<Head<T>>,
    /// Behind the newest record that was looked at.
    cursor: Lsn,
    /// The newest record that is retained and durable; below `cursor`: none is left to be found.
    last: Lsn,
    /// Another lane waits until everything up to here is sent.
    pulled: Lsn,
    pace: Option<Pace>,
    over_share: bool,
}

impl<T> Queue<T> {
    fn has_more(&self) -> bool {
        !self.heads.is_empty() || self.last >= self.cursor
    }

    /// Everything below was sent.
    fn reached(&self) -> Lsn {
        self.heads.front().map_or(self.cursor, |head| head.lsn)
    }

    /// True if something up to `lsn` may not be sent yet.
    fn lacks(&self, lsn: Lsn) -> bool {
        self.has_more() && self.reached() <= lsn
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Schedule<T> {
    lanes: [Queue<T>; LANES_MAX],
}

impl<T> Schedule<T> {
    pub fn new(lanes: &Lanes) -> Self {
        let queue = |lane: usize| {
            let class = u8::try_from(lane).map_or(LaneClass::Immediate, |lane| lanes.class(lane));
            let pace = match class {
                LaneClass::Immediate => None,
                LaneClass::Paced { items, every } => Some(Pace { items, every, left: 0, until: Duration::ZERO }),
            };
            let (heads, pulled) = (VecDeque::new(), Lsn::ZERO);
            Queue { heads, cursor: Lsn::ZERO, last: Lsn::ZERO, pulled, pace, over_share: false }
        };
        Self { lanes: std::array::from_fn(queue) }
    }

    fn queue(&mut self, lane: u8) -> &mut Queue<T> {
        &mut self.lanes[usize::from(lane)]
    }

    /// A new session begins with what is retained. The periods of paced lanes go on.
    pub fn restart(&mut self, from: Lsn) {
        for queue in &mut self.lanes {
            queue.heads.clear();
            (queue.cursor, queue.last, queue.pulled) = (from, Lsn::ZERO, Lsn::ZERO);
        }
    }

    /// Records from `lsn` on are to be sent that were passed over.
    pub fn rewind(&mut self, lsn: Lsn) {
        for queue in self.lanes.iter_mut().filter(|queue| queue.cursor > lsn) {
            // What waits for its turn is found again.
            queue.cursor = queue.heads.front().map_or(lsn, |head| head.lsn.min(lsn));
            queue.heads.clear();
        }
    }

    /// What is retained of each lane at `now`, up to where it may be sent, and the LSN behind all of it.
    pub fn on_look(&mut self, now: Duration, spans: &[LaneSpan; LANES_MAX], durable: Lsn, next: Lsn) {
        for (queue, span) in self.lanes.iter_mut().zip(spans) {
            if let Some(pace) = queue.pace.as_mut().filter(|pace| now >= pace.until) {
                (pace.left, pace.until) = (pace.items, now + pace.every);
            }
            queue.last = span.last.min(durable);
            // What the backup has, or a mark stands for, need not be looked at.
            let from = span.oldest.unwrap_or(next);
            while queue.heads.pop_front_if(|head| head.lsn < from).is_some() {}
            if queue.heads.is_empty() && span.last < queue.cursor {
                queue.cursor = queue.cursor.max(next);
            }
            queue.cursor = queue.cursor.max(from);
        }
    }

    /// The paced lanes with retained records, and the oldest of each.
    pub fn paced(&self, spans: &[LaneSpan; LANES_MAX]) -> Vec<(u8, Lsn)> {
        let paced = (0..).zip(&self.lanes).zip(spans).filter(|((_, queue), _)| queue.pace.is_some());
        paced.filter_map(|((lane, _), span)| Some((lane, span.oldest?))).collect()
    }

    /// A paced lane holds more than its share: it does not wait for its turn until it holds less.
    pub fn set_over_share(&mut self, lane: u8, over: bool) {
        self.queue(lane).over_share = over;
    }

    pub fn cursor(&self, lane: u8) -> Lsn {
        self.lanes[usize::from(lane)].cursor
    }

    /// Behind the newest record of which every one before it was sent, too; `None` if all were.
    pub fn sent_upto(&self) -> Option<Lsn> {
        self.lanes.iter().filter(|queue| queue.has_more()).map(Queue::reached).min()
    }

    /// What was found of a lane.
    pub fn on_found(&mut self, lane: u8, heads: impl IntoIterator<Item = Head<T>>, next: Lsn) {
        let queue = self.queue(lane);
        queue.heads.extend(heads);
        queue.cursor = next;
    }

    /// Drops what is not to be sent after all.
    pub fn retain(&mut self, keep: impl Fn(&Head<T>) -> bool) {
        self.lanes.iter_mut().for_each(|queue| queue.heads.retain(&keep));
    }

    /// What to do next.
    pub fn next(&mut self) -> Next {
        let Some(mut lane) = self.choose() else { return Next::Wait };
        loop {
            let Some(head) = self.lanes[usize::from(lane)].heads.front() else { return Next::Fetch(lane) };
            let lacking = head.first.iter().find(|(other, upto)| self.lanes[usize::from(*other)].lacks(*upto));
            let Some(&(other, upto)) = lacking else { return Next::Send(lane) };
            let queue = self.queue(other);
            queue.pulled = queue.pulled.max(upto);
            lane = other;
        }
    }

    fn choose(&self) -> Option<u8> {
        let oldest = |fits: &dyn Fn(&Queue<T>) -> bool| {
            let lanes = (0..).zip(&self.lanes).filter(|(_, queue)| queue.has_more() && fits(queue));
            lanes.min_by_key(|(_, queue)| queue.reached()).map(|(lane, _)| lane)
        };
        oldest(&|queue| queue.lacks(queue.pulled))
            .or_else(|| oldest(&|queue| queue.pace.is_none() || queue.over_share))
            .or_else(|| oldest(&|queue| queue.pace.is_some_and(|pace| pace.left > 0)))
    }

    /// Takes the first record of a lane, to be sent.
    pub fn take(&mut self, lane: u8) -> Option<Head<T>> {
        let queue = self.queue(lane);
        let head = queue.heads.pop_front()?;
        if let Some(pace) = &mut queue.pace {
            pace.left = pace.left.saturating_sub(1);
        }
        Some(head)
    }

    /// When a paced lane that waits for its turn may go on.
    pub fn due(&self) -> Option<Duration> {
        let waiting = self.lanes.iter().filter(|queue| queue.has_more() && !queue.over_share);
        waiting.filter_map(|queue| queue.pace).filter(|pace| pace.left == 0).map(|pace| pace.until).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Records of lanes, in the order of their LSNs from 1 on, each with what must be sent before it.
    struct World {
        records: Vec<(u8, SentFirst)>,
        sent: Vec<u64>,
        schedule: Schedule<()>,
        now: Duration,
    }

    impl World {
        fn new(classes: &[&str], records: &[(u8, &[(u8, u64)])]) -> Self {
            let classes: Vec<String> =
                classes.iter().zip('a'..).map(|(class, name)| format!("{name}={class}")).collect();
            let lanes = Lanes::parse(&classes, &[], None).unwrap();
            let first = |first: &[(u8, u64)]| first.iter().map(|(lane, lsn)| (*lane, Lsn(*lsn))).collect();
            let records = records.iter().map(|(lane, after)| (*lane, first(after))).collect();
            let mut schedule = Schedule::new(&lanes);
            schedule.restart(Lsn(1));
            Self { records, sent: Vec::new(), schedule, now: Duration::ZERO }
        }

        fn of(&self, lane: u8) -> impl Iterator<Item = (u64, &SentFirst)> {
            (1..).zip(&self.records).filter(move |(_, (l, _))| *l == lane).map(|(lsn, (_, first))| (lsn, first))
        }

        /// Sends what may be sent; returns the LSNs in their order.
        fn run(&mut self) -> Vec<u64> {
            let mut spans = [LaneSpan::default(); LANES_MAX];
            for (lane, span) in (0..).zip(&mut spans) {
                span.oldest = self.of(lane).map(|(lsn, _)| lsn).find(|lsn| !self.sent.contains(lsn)).map(Lsn);
                span.last = self.of(lane).last().map_or(Lsn::ZERO, |(lsn, _)| Lsn(lsn));
            }
            let newest = Lsn(self.records.len() as u64);
            self.schedule.on_look(self.now, &spans, newest, newest.next());
            let from = self.sent.len();
            loop {
                match self.schedule.next() {
                    Next::Wait => return self.sent[from..].to_vec(),
                    Next::Fetch(lane) => {
                        // One at a time, and others in between are passed over a few at a time.
                        let cursor = self.schedule.cursor(lane).0;
                        let upto = (cursor + 2).min(self.records.len() as u64);
                        let found = self.of(lane).find(|(lsn, _)| (cursor..=upto).contains(lsn));
                        let next = found.map_or(upto + 1, |(lsn, _)| lsn + 1);
                        let head = found.map(|(lsn, first)| Head { lsn: Lsn(lsn), first: first.clone(), record: () });
                        self.schedule.on_found(lane, head, Lsn(next));
                    }
                    Next::Send(lane) => {
                        let head = self.schedule.take(lane).unwrap();
                        let lacking = |(lane, upto): &(u8, Lsn)| {
                            self.of(*lane).any(|(lsn, _)| lsn <= upto.0 && !self.sent.contains(&lsn))
                        };
                        assert!(!head.first.iter().any(lacking), "{} overtakes: {:?}", head.lsn, self.sent);
                        assert!(self.of(lane).all(|(lsn, _)| lsn >= head.lsn.0 || self.sent.contains(&lsn)));
                        self.sent.push(head.lsn.0);
                    }
                }
            }
        }
    }

    #[test]
    fn immediate_records_overtake_paced_ones_which_keep_their_pace() {
        let mut world =
            World::new(&["immediate", "2/1s"], &[(1, &[]), (1, &[]), (1, &[]), (0, &[]), (1, &[]), (0, &[])]);
        assert_eq!(world.run(), [4, 6, 1, 2]);
        assert_eq!((world.run(), world.schedule.due()), (vec![], Some(Duration::from_secs(1))));
        world.now = Duration::from_millis(999);
        assert_eq!(world.run(), Vec::<u64>::new());
        world.now = Duration::from_secs(1);
        assert_eq!((world.run(), world.schedule.due()), (vec![3, 5], None));
    }

    #[test]
    fn a_conflict_pulls_the_earlier_record_with_its_lane_before_it() {
        let records: &[(u8, &[(u8, u64)])] = &[(1, &[]), (1, &[]), (2, &[]), (2, &[(1, 2)]), (1, &[]), (0, &[(2, 4)])];
        let mut world = World::new(&["immediate", "1/1h", "1/1h"], records);
        assert_eq!(world.run(), [3, 1, 2, 4, 6], "5 waits: what was pulled counts for the pace");
    }

    #[test]
    fn a_lane_that_holds_more_than_its_share_does_not_wait() {
        let mut world = World::new(&["immediate", "1/1h"], &[(1, &[]), (1, &[]), (0, &[]), (1, &[])]);
        world.schedule.set_over_share(1, true);
        assert_eq!(world.run(), [1, 2, 3, 4], "the oldest first");
    }

    #[test]
    fn what_a_lane_passed_over_is_sent_behind_a_rewind() {
        let mut world = World::new(&["immediate", "5/1s"], &[(0, &[]), (1, &[]), (0, &[])]);
        assert_eq!(world.run(), [1, 3, 2]);
        world.sent.retain(|lsn| *lsn != 2);
        world.schedule.rewind(Lsn(2));
        assert_eq!(world.run(), [2]);
        assert_eq!(world.schedule.sent_upto(), None);
    }

    #[test]
    fn what_waits_for_its_turn_is_not_lost_by_a_rewind() {
        let classes = ["a=immediate".to_owned(), "b=1/1s".to_owned()];
        let mut schedule = Schedule::new(&Lanes::parse(&classes, &[], None).unwrap());
        schedule.restart(Lsn(1));
        let mut spans = [LaneSpan::default(); LANES_MAX];
        spans[1] = LaneSpan { oldest: Some(Lsn(2)), last: Lsn(5) };
        schedule.on_look(Duration::ZERO, &spans, Lsn(5), Lsn(6));
        let head = |lsn| Head { lsn: Lsn(lsn), first: SentFirst::new(), record: () };
        schedule.on_found(1, [head(2), head(5)], Lsn(6));
        schedule.rewind(Lsn(4));
        assert_eq!(schedule.cursor(1), Lsn(2));
    }

    proptest::proptest! {
        #[test]
        fn everything_is_sent_in_an_order_that_is_allowed(
            lanes in proptest::collection::vec((0u8..4, proptest::collection::vec((0u8..4, 0u64..40), 0..3)), 1..40),
        ) {
            let records: Vec<(u8, Vec<(u8, u64)>)> = (1..).zip(lanes).map(|(lsn, (lane, first))| {
                (lane, first.into_iter().filter(|(l, upto)| *l != lane && *upto < lsn).collect())
            }).collect();
            let borrowed: Vec<(u8, &[(u8, u64)])> = records.iter().map(|(l, f)| (*l, &f[..])).collect();
            let mut world = World::new(&["3/1s", "immediate", "1/1s", "immediate"], &borrowed);
            for second in 0..100 {
                world.now = Duration::from_secs(second);
                world.run();
            }
            let mut sent = world.sent.clone();
            sent.sort_unstable();
            proptest::prop_assert_eq!(sent, (1..=records.len() as u64).collect::<Vec<_>>());
        }
    }
}
