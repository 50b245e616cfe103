//! One connection, as the messages of runs see it: each attempt at a run has a stream of batches and a queue of calls.
//! What belongs to different ones overtakes.

use std::collections::VecDeque;

use rand::{Rng, seq::IteratorRandom};
use understudy_common::types::{Lsn, Uid};

use super::port::{Reply, Request};

/// Messages that do not overtake each other, and what is answered.
struct Queue {
    attempt: u64,
    batches: bool,
    requests: VecDeque<Request>,
    replies: VecDeque<Reply>,
}

/// See the module.
pub(super) struct RunWire {
    pub session: Uid,
    /// The connection is gone; its messages may still arrive.
    pub old: bool,
    queues: Vec<Queue>,
}

/// A message on its way, and the attempt at a run that it belongs to.
pub(super) struct Taken {
    pub attempt: u64,
    pub request: Request,
}

impl RunWire {
    pub fn new(session: Uid) -> Self {
        Self { session, old: false, queues: Vec::new() }
    }

    fn queue(&mut self, attempt: u64, batches: bool) -> &mut Queue {
        let found = self.queues.iter().position(|q| q.attempt == attempt && q.batches == batches);
        let at = found.unwrap_or_else(|| {
            let (requests, replies) = (VecDeque::new(), VecDeque::new());
            self.queues.push(Queue { attempt, batches, requests, replies });
            self.queues.len() - 1
        });
        &mut self.queues[at]
    }

    pub fn ask(&mut self, attempt: u64, request: Request) {
        self.queue(attempt, request.is_batch()).requests.push_back(request);
    }

    /// Any message that none before it in its queue holds back.
    pub fn take(&mut self, rng: &mut impl Rng) -> Option<Taken> {
        self.queues.retain(|q| !q.requests.is_empty() || !q.replies.is_empty());
        let queue = self.queues.iter_mut().filter(|q| !q.requests.is_empty()).choose(rng)?;
        Some(Taken { attempt: queue.attempt, request: queue.requests.pop_front()? })
    }

    /// The message behind one that was taken, as if it had overtaken it.
    pub fn take_behind(&mut self, taken: &Taken) -> Option<Taken> {
        let request = self.queue(taken.attempt, taken.request.is_batch()).requests.pop_front()?;
        Some(Taken { attempt: taken.attempt, request })
    }

    /// There was no room for it.
    pub fn put_back(&mut self, Taken { attempt, request }: Taken) {
        self.queue(attempt, request.is_batch()).requests.push_front(request);
    }

    pub fn answer(&mut self, taken: &Taken, reply: Reply) {
        self.queue(taken.attempt, taken.request.is_batch()).replies.push_back(reply);
    }

    /// An answer to the attempt, if the backup is durable far enough for one.
    pub fn hear(&mut self, rng: &mut impl Rng, attempt: u64, durable: Lsn) -> Option<Reply> {
        let ready = |q: &&mut Queue| q.attempt == attempt && q.replies.front().is_some_and(|reply| reply.at <= durable);
        self.queues.iter_mut().filter(ready).choose(rng)?.replies.pop_front()
    }

    /// The connection is gone, and nobody hears an answer.
    pub fn cut(&mut self) {
        self.old = true;
        self.queues.iter_mut().for_each(|queue| queue.replies.clear());
    }
}
