{{/* A map with another's keys put into it, also those that are false, 0 or empty: (dict "base" map "over" map). YAML. */}}
{{- define "arc-topk.merged" -}}
{{- $out := deepCopy .base }}
{{- range $key, $value := .over }}
{{- $before := get $out $key }}
{{- if and (kindIs "map" $value) (kindIs "map" $before) }}
{{- $_ := set $out $key (include "arc-topk.merged" (dict "base" $before "over" $value) | fromYaml) }}
{{- else }}
{{- $_ := set $out $key $value }}
{{- end }}
{{- end }}
{{- toYaml $out }}
{{- end }}

{{/* The enabled pools by name, each with its defaults, and what follows from them: `start` and `most` pods. YAML. */}}
{{- define "arc-topk.pools" -}}
{{- $pools := dict }}
{{- range $name, $own := .Values.workerPools }}
{{- $pool := include "arc-topk.merged" (dict "base" $.Values.workerDefaults "over" (default dict $own)) | fromYaml }}
{{- if $pool.enabled }}
{{- $most := int (kindIs "invalid" $pool.maxReplicas | ternary $pool.replicas $pool.maxReplicas) }}
{{- $start := int (kindIs "invalid" $pool.minReplicas | ternary $most $pool.minReplicas) }}
{{- if gt $start $most }}
{{- fail (printf "workerPools.%s: minReplicas is %d, more than the most pods, %d" $name $start $most) }}
{{- end }}
{{- $_ := set $pool "most" $most }}
{{- $_ := set $pool "start" $start }}
{{- $_ := set $pool "builtIn" (empty $pool.command) }}
{{- if kindIs "invalid" $pool.metrics.enabled }}
{{- $_ := set $pool.metrics "enabled" $pool.builtIn }}
{{- end }}
{{- $_ := set $pools $name $pool }}
{{- end }}
{{- end }}
{{- toYaml $pools }}
{{- end }}

{{- define "arc-topk.jobName" -}}
{{- default (include "arc-topk.fullname" .) .Values.job.name }}
{{- end }}

{{/* Workers with which training starts, from 1. */}}
{{- define "arc-topk.workers" -}}
{{- if not (kindIs "invalid" .Values.job.workers) }}
{{- int .Values.job.workers }}
{{- else }}
{{- $sum := 0 }}
{{- range include "arc-topk.pools" . | fromYaml }}
{{- $sum = add $sum (mul .start .workersPerPod) }}
{{- end }}
{{- max 1 $sum }}
{{- end }}
{{- end }}

{{/* Most workers at once. */}}
{{- define "arc-topk.maxWorkers" -}}
{{- $workers := include "arc-topk.workers" . | int }}
{{- if not (kindIs "invalid" .Values.job.maxWorkers) }}
{{- if lt (int .Values.job.maxWorkers) $workers }}
{{- fail (printf "job.maxWorkers is %d, fewer than the %d workers with which training starts" (int .Values.job.maxWorkers) $workers) }}
{{- end }}
{{- int .Values.job.maxWorkers }}
{{- else }}
{{- $sum := 0 }}
{{- range include "arc-topk.pools" . | fromYaml }}
{{- $sum = add $sum (mul .most .workersPerPod) }}
{{- end }}
{{- max $workers $sum }}
{{- end }}
{{- end }}

{{/* Addresses that workers dial, shard 0 first, comma-separated. */}}
{{- define "arc-topk.shardAddresses" -}}
{{- $addresses := .Values.shards.remoteAddresses }}
{{- if .Values.shards.enabled }}
{{- $addresses = list }}
{{- range $i := until (int .Values.shards.replicas) }}
{{- $pod := printf "%s-%d" (include "arc-topk.shardName" $) $i }}
{{- $host := printf "%s.%s.%s.svc" $pod (include "arc-topk.shardService" $) $.Release.Namespace }}
{{- $addresses = append $addresses (printf "%s:%d" $host (int $.Values.shards.port)) }}
{{- end }}
{{- end }}
{{- join "," $addresses }}
{{- end }}

{{/* What cannot be, said before anything is made. */}}
{{- define "arc-topk.check" -}}
{{- $pools := include "arc-topk.pools" . | fromYaml }}
{{- if and (not .Values.shards.enabled) (not .Values.shards.remoteAddresses) }}
{{- fail "shards.enabled is false, so shards.remoteAddresses must list the shards, shard 0 first" }}
{{- end }}
{{- if and .Values.shards.enabled .Values.shards.remoteAddresses }}
{{- fail "shards.remoteAddresses is for shards that run elsewhere: set shards.enabled to false, or leave it empty" }}
{{- end }}
{{- if and (not .Values.shards.enabled) (not .Values.job.name) }}
{{- fail "shards.enabled is false, so job.name must be the name that the shards were given" }}
{{- end }}
{{- if gt (int .Values.job.minWorkers) (include "arc-topk.workers" . | int) }}
{{- fail (printf "job.minWorkers is %d, more than the %s workers with which training starts" (int .Values.job.minWorkers) (include "arc-topk.workers" .)) }}
{{- end }}
{{- if gt (int .Values.job.quorum) (include "arc-topk.maxWorkers" . | int) }}
{{- fail (printf "job.quorum is %d, more than the most workers, %s" (int .Values.job.quorum) (include "arc-topk.maxWorkers" .)) }}
{{- end }}
{{- with .Values.certificates.chart }}
{{- if ge (int .renewBeforeDays) (int .validityDays) }}
{{- fail "certificates.chart.renewBeforeDays must be below validityDays, or every upgrade would make new certificates" }}
{{- end }}
{{- end }}
{{- with .Values.shards.external }}
{{- range $what := list "hosts" "nodePorts" "loadBalancerIPs" "perShardAnnotations" }}
{{- $listed := len (index $.Values.shards.external $what) }}
{{- if and $listed (ne $listed (int $.Values.shards.replicas)) }}
{{- fail (printf "shards.external.%s has %d entries for %d shards" $what $listed (int $.Values.shards.replicas)) }}
{{- end }}
{{- end }}
{{- end }}
{{- with .Values.shards.external }}
{{- if and .enabled .sourceRanges (eq .type "NodePort") (eq .trafficPolicy "Cluster") }}
{{- fail "shards.external.sourceRanges need trafficPolicy Local with node ports: with Cluster shards see a node's address instead" }}
{{- end }}
{{- end }}
{{- range $name, $pool := $pools }}
{{- include "arc-topk.checkPool" (dict "name" $name "pool" $pool "pools" $pools) }}
{{- end }}
{{- end }}

{{- define "arc-topk.checkPool" -}}
{{- $name := .name }}
{{- with .pool }}
{{- if and .autoscaling.enabled (eq .kind "Job") }}
{{- fail (printf "workerPools.%s: autoscaling is for kind StatefulSet or Deployment; a Job asks for maxReplicas from the start" $name) }}
{{- end }}
{{- if and .volumeClaimTemplates (ne .kind "StatefulSet") }}
{{- fail (printf "workerPools.%s: volumeClaimTemplates need kind StatefulSet" $name) }}
{{- end }}
{{- if .torchDistributed.enabled }}
{{- if or (ne .kind "Job") (ne .start .most) (ne (int .workersPerPod) 1) (ne (len $.pools) 1) }}
{{- fail (printf "workerPools.%s: torchDistributed needs kind Job, a fixed number of replicas, one worker in each pod, and no other pool" $name) }}
{{- end }}
{{- end }}
{{- with .podDisruptionBudget }}
{{- if .enabled }}
{{- if and (eq $.pool.kind "Job") (or (not (kindIs "invalid" .maxUnavailable)) (kindIs "string" .minAvailable)) }}
{{- fail (printf "workerPools.%s: the disruption budget of a Job takes minAvailable alone, as a number" $name) }}
{{- end }}
{{- if and (kindIs "float64" .minAvailable) (ge (int .minAvailable) (int $.pool.most)) }}
{{- fail (printf "workerPools.%s: podDisruptionBudget.minAvailable is %d of %d pods: no node could ever be drained" $name (int .minAvailable) (int $.pool.most)) }}
{{- end }}
{{- end }}
{{- end }}
{{- if regexMatch "^shards?(-[0-9]+)?$" $name }}
{{- fail (printf "workerPools.%s: objects of the shards have that name; give the pool another one" $name) }}
{{- end }}
{{- end }}
{{- end }}
