//! Drives a comparison of both sides: the calls, the waiting, and what becomes of what differs.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, timeout},
};
use tonic::Code;
use understudy_common::{
    events::EventLog,
    store::{ModeError, ModifyError, Store, SubmitError},
    types::{BlockRange, GroupId, Lsn, VolumeId},
};
use understudy_proto::{convert, v1};

use crate::{
    api::EngineError,
    engine::unix_ms,
    link::LinkView,
    replicator::Attached,
    verify::{Difference, Verifier, VerifyError},
};

/// One call to the backup, and the wait for what the stream carries to it.
const CALL: Duration = Duration::from_secs(30);
/// Time between two messages that tell nothing but how far it is.
const TELL: Duration = Duration::from_millis(200);
/// Bytes that one repair writes.
const REPAIR_BYTES: u64 = 1 << 20;
/// Pause before a repair that found no room is tried again, and how often it is.
const ROOM: (Duration, u32) = (Duration::from_millis(50), 600);

/// What is told of a comparison.
pub(crate) type Progress = mpsc::Sender<Result<v1::VerifyProgress, EngineError>>;

/// See the module.
pub(crate) struct Comparison {
    pub store: Arc<Store>,
    /// `None` without a backup.
    pub sessions: Option<watch::Receiver<Option<Attached>>>,
    pub view: Arc<Mutex<LinkView>>,
    pub inline: bool,
    pub repair: bool,
    pub events: EventLog,
    pub told: Progress,
}

impl Comparison {
    /// Compares groups, one after the other; the first error is the last thing that is told.
    pub async fn run(mut self, groups: Vec<GroupId>, only: Option<VolumeId>) {
        for group in groups {
            if let Err(error) = self.group(group, only).await {
                // A failed send says that nobody listens.
                let _ = self.told.send(Err(error)).await;
                return;
            }
        }
    }

    async fn group(&mut self, group: GroupId, only: Option<VolumeId>) -> Result<(), EngineError> {
        let attached = self.sessions.as_mut().and_then(|sessions| sessions.borrow_and_update().clone());
        let Some(attached) = attached else {
            return Err(EngineError::NoBackup { link: self.view.lock().reason.clone() });
        };
        let session = convert::uid("session", &attached.session).map_err(EngineError::from)?;
        let snapshot = self.store.snapshot_both(group, session, unix_ms());
        let snapshot = snapshot.map_err(|error| self.of_mode(group, error))?;
        let (position, ready) = (snapshot.position(), snapshot.ready_at());
        let verifier = Verifier::new(&self.store, snapshot, attached.session.clone(), only);
        let compared = async {
            self.until(&attached, group, ready).await?;
            self.compare(&attached, group, verifier).await
        };
        let compared = compared.await;
        let (session, mut client) = (attached.session, attached.client);
        // If it does not arrive, the snapshots go with the session.
        let over = v1::EndVerifyRequest { session, position: Some(position.into()) };
        let _ = timeout(CALL, client.end_verify(over)).await;
        compared
    }

    /// Waits until a record of the group is applied here and held by the backup.
    async fn until(&mut self, attached: &Attached, group: GroupId, lsn: Lsn) -> Result<(), EngineError> {
        let (store, told) = (Arc::clone(&self.store), self.told.clone());
        let mut marks = store.marks();
        let begun = Instant::now();
        loop {
            let now = *marks.borrow_and_update();
            if now.failed {
                return Err(EngineError::Storage { message: store.failure().unwrap_or_default() });
            }
            self.check(attached, group)?;
            if now.applied >= lsn && store.is_on_backup(group, None, lsn) {
                return Ok(());
            }
            let Some(left) = CALL.checked_sub(begun.elapsed()) else {
                return Err(interrupted(format!("the backup has not confirmed record {lsn} within {CALL:?}")));
            };
            let Some(sessions) = &mut self.sessions else { return Ok(()) };
            tokio::select! {
                _ = marks.changed() => {}
                _ = sessions.changed() => {}
                () = told.closed() => return Err(EngineError::Draining),
                // A change of mode moves no mark.
                () = tokio::time::sleep(left.min(TELL)) => {}
            }
        }
    }

    /// The session is the one it began with, and the group still in continuous mode.
    fn check(&self, attached: &Attached, group: GroupId) -> Result<(), EngineError> {
        let open = self.sessions.as_ref().and_then(|sessions| sessions.borrow().clone());
        if open.is_none_or(|open| open.session != attached.session) {
            return Err(interrupted("the link was lost".to_owned()));
        }
        if self.store.is_delta(group) {
            return Err(interrupted("the group went to delta mode".to_owned()));
        }
        Ok(())
    }

    async fn compare(
        &mut self,
        attached: &Attached,
        group: GroupId,
        mut verifier: Verifier,
    ) -> Result<(), EngineError> {
        let mut client = attached.client.clone();
        let mut message = v1::VerifyProgress {
            group: self.store.with_state(|s| s.groups.get(&group).map(|g| g.name.clone())).unwrap_or_default(),
            position: Some(verifier.snapshot().position().into()),
            ..Default::default()
        };
        let (mut listed, mut told_at) = (0, Instant::now());
        loop {
            if verifier.snapshot().is_wanted() {
                return Err(interrupted(
                    "a write needed the space that the comparison's snapshot held back".to_owned(),
                ));
            }
            let polled;
            (verifier, polled) = self.poll(verifier).await?;
            let over = polled.is_none();
            if let Some(request) = polled {
                let answer = match timeout(CALL, client.digest(request)).await {
                    Ok(Ok(answer)) => answer.into_inner(),
                    Ok(Err(status)) if matches!(status.code(), Code::Aborted | Code::Unavailable) => {
                        return Err(interrupted(status.message().to_owned()));
                    }
                    Ok(Err(status)) => return Err(EngineError::NoBackup { link: status.message().to_owned() }),
                    Err(_) => return Err(interrupted(format!("the backup gave no digests within {CALL:?}"))),
                };
                verifier.on_answer(&answer).map_err(of_verify)?;
            }
            // The last one may still grow.
            let found = verifier.differences().len().saturating_sub(usize::from(!over));
            if over || found > listed || told_at.elapsed() >= TELL {
                let fresh = &verifier.differences()[listed..found.max(listed)];
                (message.done_bytes, message.total_bytes) = verifier.progress();
                message.differing_blocks += fresh.iter().map(|d| d.count).sum::<u64>();
                message.differences = fresh.iter().map(|d| self.to_wire(&verifier, d)).collect();
                message.finished = over && !(self.repair && message.differing_blocks > 0);
                self.tell(&message).await?;
                (listed, told_at) = (found.max(listed), Instant::now());
                message.differences.clear();
            }
            if over {
                break;
            }
        }
        if !message.finished {
            let differences = verifier.differences().to_vec();
            // The snapshots have done their duty.
            drop(verifier);
            message.repaired_blocks = self.mend(attached, group, &differences).await?;
            message.finished = true;
            self.tell(&message).await?;
        }
        let fields = [
            ("group", message.group),
            ("bytes", message.done_bytes.to_string()),
            ("differing_blocks", message.differing_blocks.to_string()),
            ("repaired_blocks", message.repaired_blocks.to_string()),
        ];
        let found = format!("{} blocks differ between the sides", message.differing_blocks);
        self.events.record(unix_ms(), "verify.completed", found, fields);
        Ok(())
    }

    fn to_wire(&self, verifier: &Verifier, difference: &Difference) -> v1::VerifyDifference {
        let of = verifier.snapshot().volumes().iter().find(|(spec, _)| spec.id == difference.volume);
        v1::VerifyDifference {
            volume_id: difference.volume.0,
            volume: of.map(|(spec, _)| spec.name.clone()).unwrap_or_default(),
            first_block: difference.first,
            block_count: difference.count,
            primary_unreadable: difference.unreadable,
        }
    }

    async fn tell(&self, message: &v1::VerifyProgress) -> Result<(), EngineError> {
        self.told.send(Ok(message.clone())).await.map_err(|_| EngineError::Draining)
    }

    async fn poll(&self, mut verifier: Verifier) -> Result<(Verifier, Option<v1::DigestRequest>), EngineError> {
        let poll = move || {
            let polled = verifier.poll();
            (verifier, polled)
        };
        let (verifier, polled) = if self.inline {
            poll()
        } else {
            let ended = |error| EngineError::Storage { message: format!("a comparison was ended: {error}") };
            tokio::task::spawn_blocking(poll).await.map_err(ended)?
        };
        Ok((verifier, polled.map_err(of_verify)?))
    }

    /// Writes what differs once more, and waits until the backup has it. Returns how many blocks.
    async fn mend(
        &mut self,
        attached: &Attached,
        group: GroupId,
        differences: &[Difference],
    ) -> Result<u64, EngineError> {
        let (mut blocks, mut newest) = (0, Lsn::ZERO);
        for Difference { volume, first, count, .. } in differences.iter().filter(|d| !d.unreadable) {
            let spec = self.store.with_state(|state| state.volumes.get(volume).cloned());
            // Deleted meanwhile.
            let Some(spec) = spec else { continue };
            let step = (REPAIR_BYTES / u64::from(spec.block_size.bytes())).max(1);
            let mut at = *first;
            while at < first + count {
                let range = BlockRange { volume: *volume, first: at, count: step.min(first + count - at) };
                newest = self.rewrite(range).await?;
                at = range.end();
            }
            blocks += count;
        }
        if newest > Lsn::ZERO {
            self.until(attached, group, newest).await?;
        }
        Ok(blocks)
    }

    async fn rewrite(&self, range: BlockRange) -> Result<Lsn, EngineError> {
        for _ in 0..ROOM.1 {
            let store = Arc::clone(&self.store);
            let write = move || store.rewrite(range, unix_ms());
            let written = if self.inline {
                write()
            } else {
                let ended = |error| EngineError::Storage { message: format!("a repair was ended: {error}") };
                tokio::task::spawn_blocking(write).await.map_err(ended)?
            };
            match written {
                Ok(submitted) => return Ok(submitted.lsn),
                Err(ModifyError::Submit(
                    SubmitError::StagingFull { .. } | SubmitError::Space(_) | SubmitError::Level(_),
                )) => {
                    self.store.request_trim();
                    self.store.request_growth();
                    tokio::time::sleep(ROOM.0).await;
                }
                Err(error) => return Err(interrupted(format!("blocks could not be repaired: {error}"))),
            }
        }
        Err(interrupted("a repair found no room in the journal or the pool".to_owned()))
    }

    fn of_mode(&self, group: GroupId, error: ModeError) -> EngineError {
        let name = self.store.with_state(|s| s.groups.get(&group).map(|g| g.name.clone())).unwrap_or_default();
        match error {
            ModeError::NoGroup(_) => EngineError::NoGroup { group: name },
            ModeError::Illegal { .. } => EngineError::WrongPhase {
                group: name,
                phase: "delta",
                why: "the sides differ by what is marked; compare them when the group is back in continuous mode \
                      (`policy explain` says what it waits for)"
                    .into(),
            },
            ModeError::Submit(SubmitError::Failed(error)) => EngineError::Storage { message: error.to_string() },
            ModeError::Submit(error) => interrupted(error.to_string()),
        }
    }
}

fn of_verify(error: VerifyError) -> EngineError {
    interrupted(error.to_string())
}

fn interrupted(why: String) -> EngineError {
    EngineError::Superseded { why }
}
