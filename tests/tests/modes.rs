//! Modes of the whole pair, in virtual time: schedules, a backup that cannot, and clients that wait for both sides.

use std::time::Duration;

use anyhow::{Result, ensure};
use tonic::{Code, Status};
use understudy_common::policy::{PolicyConfig, Schedule};
use understudy_proto::v1::{AckRule, AwayRule, Durability, Mode, VolumeStatus, WriteBlockResponse};
use understudy_tests::virtual_pair::scenario::{
    Setting, block_on_backup, content, create_volume, cut_link, discard, hold_delta, pass, play, repair_link,
    set_policy, start_delta, status, until, until_attached, until_settled, write, write_segments,
};

fn is_delta(volume: &VolumeStatus) -> bool {
    volume.mode() == Mode::Delta
}

fn committed(volume: &VolumeStatus) -> bool {
    volume.last_run.as_ref().is_some_and(|run| run.result == "committed")
}

/// Nothing was copied: the mark is there, no run has ended, and the backup shows what it showed.
async fn nothing_has_run(volume: &str, block: u64, shows: u64) -> Result<()> {
    let seen = status(volume).await?;
    ensure!(is_delta(&seen) && seen.dirty_blocks > 0 && seen.run.is_none(), "{seen:?}");
    ensure!(block_on_backup(volume, block).await? == content(block, shows), "the backup shows block {block}");
    Ok(())
}

#[test]
fn the_prompted_schedule_waits_for_an_operator() -> Result<()> {
    // Other schedules, if they were in force, would begin a run at once.
    let at_once = Duration::from_millis(200);
    let base = Setting::default();
    let policy = PolicyConfig { schedule: Schedule::Prompted, interval: at_once, idle_for: at_once, ..base.policy };
    play(Setting { policy, ..base }, || async {
        create_volume("v", 1, AckRule::Staged, AwayRule::Degrade).await?;
        hold_delta("v", true).await?;
        for (stamp, shows) in [(1, 0), (2, 1)] {
            write("v", 0, stamp).await?;
            pass(Duration::from_secs(10)).await;
            nothing_has_run("v", 0, shows).await?;
            start_delta("v").await?;
            until("v", "the run is committed", |v| v.dirty_blocks == 0).await?;
            // The cause still holds: a run is not a return.
            ensure!(is_delta(&status("v").await?));
            ensure!(block_on_backup("v", 0).await? == content(0, stamp));
        }
        // What it waited was long enough: under the periodic schedule a run begins by itself.
        write("v", 0, 3).await?;
        set_policy("delta.schedule", "periodic").await?;
        until("v", "a run of the periodic schedule is committed", |v| v.dirty_blocks == 0).await?;
        hold_delta("v", false).await?;
        until_settled("v").await?;
        ensure!(block_on_backup("v", 0).await? == content(0, 3));
        Ok(())
    })
}

#[test]
fn the_idle_schedule_waits_until_usage_and_link_are_low() -> Result<()> {
    let base = Setting::default();
    let policy = PolicyConfig {
        schedule: Schedule::Idle,
        idle_for: Duration::from_secs(1),
        idle_bytes_per_second: 512,
        interval: Duration::from_millis(200),
        ..base.policy
    };
    play(Setting { policy, ..base }, || async {
        for name in ["v", "other"] {
            create_volume(name, 1, AckRule::Staged, AwayRule::Degrade).await?;
        }
        hold_delta("v", true).await?;
        // First the group itself is written, then another one, which keeps the link busy: some KiB a second.
        for name in ["v", "other"] {
            for stamp in 1..200 {
                write(name, stamp % 8, stamp).await?;
                pass(Duration::from_millis(50)).await;
            }
            nothing_has_run("v", 1, 0).await?;
        }
        until("v", "a run is committed", |v| committed(v) && v.dirty_blocks == 0).await?;
        ensure!(is_delta(&status("v").await?));
        ensure!(block_on_backup("v", 1).await? == content(1, 193));
        Ok(())
    })
}

#[test]
fn a_group_that_the_backup_refuses_goes_to_delta_mode_alone_and_comes_back() -> Result<()> {
    let setting = Setting { backup_segments: 16, ..Setting::default() };
    play(setting, || async {
        for (name, segments) in [("small", 1), ("ballast", 8), ("large", 12)] {
            create_volume(name, segments, AckRule::Staged, AwayRule::Degrade).await?;
        }
        write("small", 0, 1).await?;
        write_segments("ballast", 0..8, 100).await?;
        until_settled("ballast").await?;
        // Seven segments are left for twelve.
        write_segments("large", 0..12, 200).await?;
        let refused = until("large", "it is in delta mode", is_delta).await?;
        ensure!(refused.cause == "backup_refused", "{refused:?}");
        ensure!(refused.dirty_blocks > 0 && status("small").await?.mode() == Mode::Continuous);

        // Trials are refused, with the cause; the other group goes on meanwhile.
        let why = until("large", "a trial is refused", |v| v.last_run.is_some()).await?.last_run.unwrap_or_default();
        ensure!(why.result == "refused" && why.reason.contains("space"), "{why:?}");
        for stamp in 2..50 {
            let ack = write("small", 0, stamp).await?;
            ensure!(ack.mode() == Mode::Continuous, "{ack:?}");
            pass(Duration::from_millis(100)).await;
        }
        until_settled("small").await?;
        ensure!(block_on_backup("small", 0).await? == content(0, 49));
        let still = status("large").await?;
        ensure!(is_delta(&still) && still.cause == "backup_refused", "{still:?}");

        // The backup gets space, and nobody tells the primary.
        discard("ballast", 8).await?;
        until_settled("large").await?;
        for segment in 0..12 {
            ensure!(block_on_backup("large", segment * 128).await? == content(segment * 128, 200 + segment));
        }
        Ok(())
    })
}

fn durability(ack: &WriteBlockResponse) -> Durability {
    ack.durability()
}

/// The write was not confirmed, and may have been executed.
fn is_unknown(refused: &Status) -> bool {
    refused.code() == Code::Unavailable && refused.message().contains("unknown")
}

#[test]
fn a_write_for_both_sides_is_answered_by_the_commit_of_a_run_when_the_link_was_cut() -> Result<()> {
    play(Setting::default(), || async {
        create_volume("v", 1, AckRule::Both, AwayRule::Block).await?;
        ensure!(durability(&write("v", 0, 1).await?) == Durability::Both);

        cut_link();
        let waiting = tokio::spawn(write("v", 0, 2));
        let left = until("v", "it is in delta mode", is_delta).await?;
        ensure!(left.cause == "link_down" && left.dirty_blocks == 1, "{left:?}");
        // A new write is refused before it has a place.
        let next = left.position.unwrap_or_default().next;
        let refused = write("v", 1, 3).await.expect_err("the backup is away");
        ensure!(refused.code() == Code::Unavailable && refused.message().contains("the backup is away"), "{refused}");
        ensure!(status("v").await?.position.unwrap_or_default().next == next, "a refused write took a place");
        pass(Duration::from_secs(5)).await;
        ensure!(!waiting.is_finished(), "answered, and the backup cannot have it: {:?}", waiting.await);
        ensure!(block_on_backup("v", 0).await? == content(0, 1));

        repair_link();
        let ack = waiting.await??;
        ensure!(durability(&ack) == Durability::Both && !ack.duplicate, "{ack:?}");
        // It is there already when the answer comes, and only a run can have brought it.
        ensure!(block_on_backup("v", 0).await? == content(0, 2));
        ensure!(committed(&status("v").await?));
        until_settled("v").await?;
        ensure!(durability(&write("v", 1, 3).await?) == Durability::Both);
        ensure!(block_on_backup("v", 1).await? == content(1, 3));
        Ok(())
    })
}

#[test]
fn a_write_for_both_sides_is_unknown_at_the_deadline_and_both_when_it_is_repeated() -> Result<()> {
    let request_deadline = Duration::from_secs(4);
    play(Setting { request_deadline, ..Setting::default() }, move || async move {
        create_volume("v", 1, AckRule::Both, AwayRule::Block).await?;
        ensure!(durability(&write("v", 0, 1).await?) == Durability::Both);
        cut_link();
        let began = tokio::time::Instant::now();
        let unknown = write("v", 0, 2).await.expect_err("nobody has confirmed it");
        ensure!(is_unknown(&unknown), "{unknown}");
        // Seven eighths of the deadline, so that the answer reaches the client. Virtual time is exact.
        let took = began.elapsed();
        ensure!(took >= request_deadline * 7 / 8 && took < request_deadline, "answered after {took:?}");
        ensure!(block_on_backup("v", 0).await? == content(0, 1));

        repair_link();
        until_settled("v").await?;
        let again = write("v", 0, 2).await?;
        ensure!(again.duplicate && durability(&again) == Durability::Both, "{again:?}");
        ensure!(block_on_backup("v", 0).await? == content(0, 2));
        Ok(())
    })
}

#[test]
fn a_degraded_volume_says_local_until_the_backup_has_it() -> Result<()> {
    play(Setting::default(), || async {
        create_volume("v", 1, AckRule::Both, AwayRule::Degrade).await?;
        ensure!(durability(&write("v", 0, 1).await?) == Durability::Both);

        cut_link();
        // One write is under way when the link is lost, one comes after the switch.
        let waiting = tokio::spawn(write("v", 0, 2));
        until("v", "it is in delta mode", is_delta).await?;
        for ack in [waiting.await??, write("v", 1, 3).await?, write("v", 1, 3).await?] {
            ensure!(durability(&ack) == Durability::Local && ack.mode() == Mode::Delta, "{ack:?}");
        }
        ensure!(block_on_backup("v", 0).await? == content(0, 1));

        // A run while the group stays in delta mode: its commit covers what came before the cut, and nothing else.
        hold_delta("v", true).await?;
        repair_link();
        until_attached().await?;
        start_delta("v").await?;
        until("v", "the run is committed", |v| v.dirty_blocks == 0).await?;
        ensure!(durability(&write("v", 0, 2).await?) == Durability::Both, "the commit covers it");
        ensure!(durability(&write("v", 0, 4).await?) == Durability::Local);

        hold_delta("v", false).await?;
        until_settled("v").await?;
        for (block, stamp) in [(0, 4), (1, 3)] {
            let again = write("v", block, stamp).await?;
            ensure!(again.duplicate && durability(&again) == Durability::Both, "{again:?}");
            ensure!(block_on_backup("v", block).await? == content(block, stamp));
        }
        ensure!(durability(&write("v", 0, 5).await?) == Durability::Both);
        Ok(())
    })
}
