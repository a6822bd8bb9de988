{{- define "arc-topk.shardContainer" -}}
{{- $shards := .Values.shards }}
image: {{ include "arc-topk.image" (dict "root" $ "image" $shards.image) }}
imagePullPolicy: {{ $shards.image.pullPolicy }}
{{- with $shards.extraArgs }}
args:
  {{- toYaml . | nindent 2 }}
{{- end }}
env:
  - name: ARC_SHARD
    valueFrom:
      fieldRef:
        fieldPath: metadata.labels['apps.kubernetes.io/pod-index']
  {{- range $name, $value := include "arc-topk.shardSettings" . | fromYaml }}
  - name: {{ $name }}
    value: {{ include "arc-topk.text" $value | quote }}
  {{- end }}
  {{- with $shards.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with $shards.extraEnvFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
ports:
  - name: quic
    containerPort: {{ int $shards.port }}
    protocol: UDP
  - name: admin
    containerPort: {{ int $shards.adminPort }}
    protocol: TCP
{{- range $probe := list "startupProbe" "livenessProbe" "readinessProbe" }}
{{- with index $shards $probe }}
{{ $probe }}:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- with $shards.resources }}
resources:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $shards.securityContext }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
volumeMounts:
  - name: certs
    mountPath: /etc/arc-topk/certs
    readOnly: true
  {{- if $shards.snapshots.persistence.enabled }}
  - name: snapshots
    mountPath: /var/lib/arc-topk
  {{- end }}
  {{- with $shards.extraVolumeMounts }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}

{{/* Environment of `arc-ps`, but for its number. YAML. */}}
{{- define "arc-topk.shardSettings" -}}
{{- with .Values }}
ARC_SHARDS: {{ int .shards.replicas }}
ARC_WORKERS: {{ include "arc-topk.workers" $ }}
ARC_MAX_WORKERS: {{ include "arc-topk.maxWorkers" $ }}
ARC_MIN_WORKERS: {{ int .job.minWorkers }}
ARC_QUORUM: {{ int .job.quorum }}
ARC_STRAGGLER_TIMEOUT_SECONDS: {{ .job.stragglerTimeoutSeconds }}
ARC_RESYNC: {{ .job.resync }}
ARC_START_GRACE_SECONDS: {{ .shards.startGraceSeconds }}
ARC_JOB: {{ include "arc-topk.jobName" $ | quote }}
ARC_LOG: {{ .job.log | quote }}
ARC_LISTEN: {{ printf "%s:%d" .shards.listenAddress (int .shards.port) | quote }}
ARC_ADMIN: {{ printf "%s:%d" .shards.listenAddress (int .shards.adminPort) | quote }}
ARC_CERTS: /etc/arc-topk/certs
ARC_SNAPSHOT_KEEP: {{ int .shards.snapshots.keep }}
ARC_SNAPSHOT_LIMIT_BYTES: {{ int64 .shards.snapshots.limitBytes }}
{{- if .shards.snapshots.persistence.enabled }}
# A folder of its own: the root of a volume may hold lost+found.
ARC_SNAPSHOT_DIR: /var/lib/arc-topk/snapshots
{{- end }}
{{- end }}
{{- end }}

{{/* On which nodes shards run. */}}
{{- define "arc-topk.shardPlacement" -}}
{{- $labels := dict "root" $ "component" "shard" }}
{{- $shards := .Values.shards }}
{{- $term := dict "topologyKey" "kubernetes.io/hostname" "labelSelector" (dict "matchLabels" (include "arc-topk.selector" $labels | fromYaml)) }}
{{- $apart := dict }}
{{- if eq $shards.antiAffinity "hard" }}
{{- $apart = dict "podAntiAffinity" (dict "requiredDuringSchedulingIgnoredDuringExecution" (list $term)) }}
{{- else if eq $shards.antiAffinity "soft" }}
{{- $apart = dict "podAntiAffinity" (dict "preferredDuringSchedulingIgnoredDuringExecution" (list (dict "weight" 100 "podAffinityTerm" $term))) }}
{{- end }}
{{- with include "arc-topk.merged" (dict "base" $apart "over" $shards.affinity) | fromYaml }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- $zones := list (dict "maxSkew" 1 "topologyKey" "topology.kubernetes.io/zone" "whenUnsatisfiable" "ScheduleAnyway") }}
topologySpreadConstraints:
  {{- include "arc-topk.spread" (merge (dict "constraints" (default $zones $shards.topologySpreadConstraints)) $labels) | trim | nindent 2 }}
{{- with $shards.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $shards.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
